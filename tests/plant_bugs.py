"""Plants typical bugs of K-FAC code, one at a time, in a copy of the package, and lets the tests find them.

`make plant-bugs`, or `python tests/plant_bugs.py [name …]`. Each bug is one replacement in one file; the tests named beside
it must fail. Prints a table, and exits with 1 if a bug survives or its place is no longer there.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[1]


@dataclass(frozen=True)
class Bug:
    file: str
    right: str
    wrong: str
    tests: str


OWN = "test_own_derivatives.py"
LINEAR, KINDS, LOSSES = "test_linear_exactness.py", "test_layers_exactness.py", "test_losses.py"
EKFAC, TOLD, MULTIPLIER, NOISE = "test_ekfac.py", "test_diagnostics.py", "test_multiplier.py", "test_noise.py"
RESUME, GROUPS, COPIES, CHANGE = "test_resume.py", "test_groups.py", "test_copies.py", "test_quadratic_change.py"
SAMPLE, TRUST, AVERAGING, RATES = "test_quadratic_sample.py", "test_trust.py", "test_averaging.py", "test_rates.py"
JOINT, REST, SIDE = "test_joint.py", "test_undeclared.py", "test_side_effects.py"
BUGS = {
    "G divided by the number of data": Bug("batch.py", "return 1.0 / (R * self.multiplier**2) if self.fisher == \"empirical\" else R", "return (1.0 / (R * self.multiplier**2) if self.fisher == \"empirical\" else R) / max(self.data, 1)", LINEAR),
    "loss reduced by mean treated as a sum": Bug("criterion.py", "return self.weight if self.reduction == \"sum\" else self.weight / (terms or 1.0)", "return self.weight", LINEAR),
    "the 2 of torch's MSE forgotten": Bug("likelihoods.py", "return 1.0 if self.half else 2.0", "return 1.0", LINEAR),
    "empirical Fisher with R instead of 1/R": Bug("batch.py", "return 1.0 / (R * self.multiplier**2) if self.fisher == \"empirical\" else R", "return R", LINEAR),
    "A summed, not averaged": Bug("layers/moments.py", "weight = float(count)", "weight = 1.0", KINDS),
    "positions of reduce not squared": Bug("layers/moments.py", "weight = float(n * positions**2)", "weight = float(n * positions)", KINDS),
    "bias of reduce 1 and not S": Bug("layers/moments.py", "flat, one, count = rows.sum(-2), float(positions), n", "flat, one, count = rows.sum(-2), 1.0, n", KINDS),
    "bias column left out of A": Bug("layers/moments.py", "gram[..., :d, d] = gram[..., d, :d] = flat", "gram[..., :d, d] = gram[..., d, :d] = 0 * flat", LINEAR),
    "bias corner forgotten": Bug("layers/moments.py", "gram[..., d, d] = count * one**2", "gram[..., d, d] = 1.0", LINEAR),
    "patches with the taps before the channels": Bug("layers/convolution.py", "x.movedim(1, 1 + axes).flatten(1 + axes)", "x.movedim(1, -1).flatten(1 + axes)", KINDS),
    "dilation ignored": Bug("layers/convolution.py", "x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]", "x.unfold(axis, d * (k - 1) + 1, s)[..., :k]", KINDS),
    "padding mode ignored": Bug("layers/convolution.py", 'mode = "constant" if module.padding_mode == "zeros" else module.padding_mode', 'mode = "constant"', KINDS),
    "'same' padding on the wrong side": Bug("layers/convolution.py", "(t // 2, t - t // 2)", "(t - t // 2, t // 2)", "test_layers_rows.py"),
    "transposed kernel not flipped": Bug("layers/convolution.py", "self.module.dilation, flip=True", "self.module.dilation, flip=False", KINDS),
    "output padding ignored": Bug("layers/convolution.py", "d * (k - 1) - p + extra))", "d * (k - 1) - p))", KINDS),
    "padding tokens counted": Bug("layers/embedding.py", "if padding is None else tokens != padding", "", f"{KINDS} test_layers_rows.py"),
    "swapped factors": Bug("inverses.py", 'A = inverse["A_inverse"]', 'A = inverse["G_inverse"]', "test_linear_step.py"),
    "dampings exchanged": Bug("damping.py", "partial(_given, Damping(a, g))", "partial(_given, Damping(g, a))", "test_linear_step.py test_damping.py"),
    "pi upside down": Bug("damping.py", "squared = mean_diagonal(A) / mean_diagonal(G)", "squared = mean_diagonal(G) / mean_diagonal(A)", "test_damping.py"),
    "only the last call of a module": Bug("capture.py", "        self._calls.append(call)", "        self._calls = [c for c in self._calls if c.layer is not layer] + [call]", f"{LINEAR} {KINDS}"),
    "only the last micro-batch": Bug("factors.py", "self.G[part] += total * weight", "self.G[part] = total * weight", LINEAR),
    "samples not averaged": Bug("vectors.py", "1.0 / samples", "1.0", LINEAR),
    "all positions switched on together": Bug("vectors.py", "    if positions == 1:\n", "    if True:\n", LOSSES),
    "ignored targets counted": Bug("losses.py", "kept = target != ignore_index", "kept = torch.ones_like(target, dtype=torch.bool)", LOSSES),
    "class weights ignored": Bug("losses.py", "curvature = ((1 - smoothing) * own + smoothing * weight.mean()) * kept", "curvature = (1.0 + 0 * own) * kept", LOSSES),
    "positive weights on the negatives": Bug("losses.py", "1 + (module.pos_weight - 1) * target", "1 + (module.pos_weight - 1) * (1 - target)", LOSSES),
    "weights of a mean not in its divisor": Bug("losses.py", "return Weights(curvature.unsqueeze(1), (own * kept).unsqueeze(1))", "return Weights(curvature.unsqueeze(1), (0 * own + kept).unsqueeze(1))", LOSSES),
    "running average biased to the start": Bug("factors.py", "share = 1.0 / state[age].item()", "share = 1.0 - decay", "test_factors.py"),
    "scale of a normalization with the raw input": Bug("layers/normalization.py", "        return normalize(self.module, x)", "        return x", KINDS),
    "key and value blocks exchanged": Bug("layers/attention.py", "return slice(start, start + weight.shape[0] // self.shape[0])", "return slice(0, weight.shape[0] // self.shape[0])", "test_layers_rows.py"),
    "hidden state one step late": Bug("layers/recurrent.py", "state = step(module, z[:, t], hidden.apply(state[0], self.recorder), state)", "state = step(module, z[:, t - 1], hidden.apply(state[0], self.recorder), state)", "test_layers_recurrent.py test_layers_rows.py"),
    "weight norm without the length of v": Bug("layers/weight_norm.py", "ratio * gradients[1]", "gradients[1]", "test_layers_rows.py"),
    "quadratic model without the batch's scale": Bug("local_model.py", "self.likelihood.scale(self.total_terms) * self.total_terms / own", "self.likelihood.scale(self.total_terms)", "test_quadratic.py"),
    "EKFAC's eigenvalues those of K-FAC": Bug("curvature.py", "b if (s := spectra[n]) is None else b.corrected(s)", "b", "test_curvature.py"),
    "positions squared one by one": Bug("layers/spectrum.py", "(some_g.mT @ some_x).square().sum(-3)", "(some_g.square().mT @ some_x.square()).sum(-3)", EKFAC),
    "calls squared one by one": Bug("capture.py", "whole = self.sampling or self.bases is not None", "whole = False", EKFAC),
    "tokens of all data together": Bug("layers/embedding.py", "keys = x.squeeze(-1) + size * ", "keys = x.squeeze(-1) + 0 * ", EKFAC),
    "squares not in units of the loss": Bug("batch.py", "None if sums is None else sums * self.scale()", "sums", EKFAC),
    "squares of the last micro-batch": Bug("batch.py", "self.spectra[layer.name][part] += total", "self.spectra[layer.name][part] = total", EKFAC),
    "squares of a fraction for those of all": Bug("capture.py", "add_squares(first.owner, total, first.blocks, weight * first.upscale)", "add_squares(first.owner, total, first.blocks, weight)", EKFAC),
    "rows rotated by the transposed basis": Bug("layers/spectrum.py", "rows.flatten(-3, -2) @ Q)", "rows.flatten(-3, -2) @ Q.mT)", EKFAC),
    "squares of a new basis averaged with nothing": Bug("inverses.py", "age = torch.ones((), dtype=A.dtype)", "age = torch.zeros((), dtype=A.dtype)", EKFAC),
    "EKFAC damped by the product alone": Bug("inverses.py", "shift = damping.g * a + g * damping.a + ", "shift = ", "test_inverses.py"),
    "KL of a step without its half": Bug("diagnostics.py", "return 0.5 * torch.sum(apply", "return torch.sum(apply", TOLD),
    "KL of a weight-normalized step as of a gradient": Bug("diagnostics.py", "layer.step_to_matrix(moved)", "layer.to_matrix(moved)", TOLD),
    "condition of the factor without its damping": Bug("diagnostics.py", 'largest_eigenvalue(state["A"]) + damping.a', 'largest_eigenvalue(state["A"])', TOLD),
    "diagnostics draw from the user's stream": Bug("diagnostics.py", "generator=torch.Generator().manual_seed(0)", "generator=None", TOLD),
    "age of the inverses one too many": Bug("preconditioner.py", "applied, self.steps - 1", "applied, self.steps", TOLD),
    "damping told of before a checkpoint": Bug("metric.py", "        self.applied.clear()\n", "", TOLD),
    "tied table corrected by the head alone": Bug("layers/tied.py", "self.per_datum = not any(map(self.swaps, uses))", "self.per_datum = True", EKFAC),
    "total counted for every datum": Bug("noise.py", "energy - total / data", "energy - total", NOISE),
    "noise of a sample taken for that of all": Bug("noise.py", " * data / (data - 1)])", "])", NOISE),
    "one datum without noise": Bug("noise.py", "if data < 2 or", "if not data or", NOISE),
    "noise averaged as energy": Bug("noise.py", "share = (latest[1:] / latest[:1]).clamp(max=1)", "share = latest[1:]", NOISE),
    "doubt not squared": Bug("damping.py", "evidence.noise_to_signal * doubt**2", "evidence.noise_to_signal * doubt", "test_damping.py"),
    "confirmed at the start of the step": Bug("quadratic.py", "float(b[-1] - M[-1, -1] / 2)", "float(b[-1] + M[-1, -1] / 2)", f"test_quadratic.py {MULTIPLIER}"),
    "a promise of a wrong multiplier believed": Bug("multiplier.py", "if self._is_trusted and promised < 0", "if promised < 0", "test_robustness.py"),
    "the rest of the data not weighed": Bug("rerun.py", "(data - top) / (size - top)", "1.0", SAMPLE),
    "curvature of the chosen data not weighed": Bug("local_model.py", "root = self._weigh(at).sqrt()", "root = torch.ones(()) if self.weights is None else self.weights.curvature.sqrt()", SAMPLE),
    "gradient of the chosen data not weighed": Bug("local_model.py", "return taken * self._emphasis(taken) / self.share", "return taken / self.share", SAMPLE),
    "damping eased by the arithmetic mean": Bug("trust.py", "+ math.log(max(rate, LEAST_RATE))", "+ max(rate, LEAST_RATE) - 1", TRUST),
    "rates judged twice": Bug("trust.py", "torch.tensor(Ease(factor, share, averaged=float(averaged)))", "torch.tensor(before._replace(factor=factor, share=share, averaged=float(averaged)))", TRUST),
    "ease applied to one damping": Bug("damping.py", "* evidence.curvature * ease", "* evidence.curvature", "test_damping.py"),
    "damping of averaged gradients eased": Bug("damping.py", "1.0 if evidence.averaged else evidence.ease", "evidence.ease", "test_damping.py"),
    "the batch's own gradient for the average": Bug("optimizer.py", "self.preconditioner.gradient if averaged is None else averaged.get", "self.preconditioner.gradient", RATES),
    "the average remembers what it looks ahead to": Bug("averaging.py", "like(average, parameter)", "like(ahead[parameter], parameter)", AVERAGING),
    "an average that leads uphill goes on": Bug("optimizer.py", "if averaged is not None and not alpha:", "if False:", RATES),
    "rates rise at once": Bug("averaging.py", "            latest = max(latest, math.sqrt(latest * before), self._progress.least)\n", "            pass\n", AVERAGING),
    "rates rise without bound": Bug("averaging.py", "math.sqrt(latest * before), self._progress.least)", "math.sqrt(latest * before))", AVERAGING),
    "rates rise where the error does not fall": Bug("averaging.py", "(pace / RISE if gains else pace)", "(pace / RISE)", AVERAGING),
    "noise left as if all gradients weighed the same": Bug("averaging.py", "(1 - DECAY**2) ** 2 + ", "", AVERAGING),
    "directions evened from the wrong side": Bug("polar.py", "root @ natural if left else natural @ root", "natural @ root if gram.shape[-1] == natural.shape[-1] else root @ natural", "test_polar.py"),
    "singular values evened down to rounding": Bug("polar.py", "(NOISE * noise + LEAST)", "LEAST", "test_polar.py"),
    "evened directions of another length": Bug("polar.py", "* (total / length.clamp(min=torch.finfo(gram.dtype).tiny)).sqrt()", "", "test_polar.py"),
    "directions evened whatever it costs": Bug("polar.py", "smaller > 1 and rows >= ROWS_PER_DIMENSION * smaller", "smaller > 1", "test_polar.py"),
    "directions of single batches evened": Bug("metric.py", "noise.known(states.values()) if averaged else []", "noise.known(states.values())", "test_polar.py"),
    "EKFAC's block taken for a product": Bug("metric.py", '"spectrum" not in self.inverse.names', "True", "test_polar.py"),
    "rows of a part counted for all": Bug("factors.py", "self.of += moment.rows * weight", "self.of += moment.rows", "test_polar.py"),
    "a refuted step is trusted": Bug("trust.py", "self._heed(BACK if refuted else FORTH)", "self._heed(FORTH)", TRUST),
    "steps that are refuted stay": Bug("multiplier.py", "return is_evident and float(self.ranks.mean(back())) > -self.promised", "return False", MULTIPLIER),
    "rates do not heed what batches refuted": Bug("quadratic.py", "caution < 1 and given[0] is None", "False", TRUST),
    "weights of data not seen": Bug("likelihoods.py", "return weights if counted is None else weights * counted", "return counted", "test_quadratic_change.py test_likelihoods.py"),
    "weights read from targets that are no labels": Bug("likelihoods.py", "if not torch.allclose(weights, (most / p)[clear], rtol=ALIKE, atol=0.0):", "if not weights.numel():", "test_likelihoods.py"),
    "classes that are ruled out differ from themselves": Bug("local_model.py", "self._ruled_out = impossible if impossible.any() else None", "pass", "test_quadratic_change.py"),
    "rates fall slowly": Bug("averaging.py", "max(latest, math.sqrt(latest * before), self._progress.least)", "math.sqrt(latest * before)", AVERAGING),
    "windows of one length": Bug("averaging.py", "WINDOW * (float(self.state[\"step\"]) - latest.steps)", "0", AVERAGING),
    "the rate of a metric that is gone": Bug("averaging.py", "or renewed or", "or", AVERAGING),
    "the slope of the average for the batch's own": Bug("rates.py", "-step * own + bend / 2", "-step * slope + bend / 2", RATES),
    "a stale average followed all the way": Bug("rates.py", "return min(self.own / self.averaged, 1.0)", "return 1.0", RATES),
    "factors of the latest batch alone": Bug("factors.py", "return decay if averages else", "return 0.0 if averages else", RATES + " test_factors.py"),
    "nobody looks at the first averages": Bug("rates.py", "evident=pace.is_young", "evident=False", RATES),
    "a new average followed to infinity": Bug("averaging.py", "latest = max(latest, self._progress.least / ANEW)", "pass", AVERAGING),
    "rates of before forgotten by a window without steps": Bug("averaging.py", "(pace / RISE if gains else pace) or self.least", "pace / RISE if gains else pace", AVERAGING),
    "averages that end in denormal numbers": Bug("averaging.py", "                if flushed:\n", "                if False:\n", AVERAGING),
    "steps shorter for an error that tells nothing": Bug("averaging.py", "* self.before or falls", "* self.before", AVERAGING),
    "slopes that noise explains believed": Bug("averaging.py", "-CERTAIN * math.sqrt(self.squares)", "0.0", AVERAGING),
    "an older step of a layer that rested": Bug("optimizer.py", "self.state[parameter][\"velocity\"].zero_()", "pass", "test_look_back.py"),
    "rates that stay where nobody looks back": Bug("rates.py", "promised, change if is_witness else promised", "promised if is_witness else 0.0, change", "test_look_back.py"),
    "a step after one that was undone at full length": Bug("quadratic.py", "judge(looking_back(b, M) if len(b) > 1 else 0.0)", "judge(looking_back(b, M)) if len(b) > 1 else 1.0", "test_quadratic.py"),
    "few data learnt by heart for a multiplier": Bug("multiplier.py", "-back - (1 - noise) * slope", "-back - slope", "test_few_rows.py"),
    "noise on the same batch": Bug("multiplier.py", "0.0 if self.is_repeated else self._noise()", "self._noise()", "test_multiplier.py"),
    "factors of few rows soon forgotten": Bug("factors.py", "(1 - AVERAGED_DECAY) * (1 - share)", "0.0", "test_factors.py"),
    "factors of few rows that starve": Bug("schedule.py", "return {name for name, share in shares.items() if share < 1 and", "return {name for name, share in shares.items() if False and", "test_schedule.py test_few_rows.py"),
    "layers that gather without need": Bug("schedule.py", "if share < 1 and step", "if step", "test_schedule.py test_few_rows.py"),
    "all modules opened for one that is due": Bug("capture.py", "return any(layer.owner.name in self.due for layer in layers)", "return bool(self.due)", "test_few_rows.py"),
    "noise measured with every few rows": Bug("capture.py", "if self.sampling and self.whole:", "if self.sampling:", "test_few_rows.py"),
    "a given number averaged away": Bug("optimizer.py", "self.preconditioner.may_average = lr == momentum == \"auto\"", "self.preconditioner.may_average = True", RATES),
    "denormal products": Bug("layers/moments.py", "without_denormal_products(at_least_float32(rows))", "at_least_float32(rows)", "test_factors.py"),
    "a parabola believed at the end of a long step": Bug("trust.py", " and _refuted(promised, in_fact())", "", TRUST),
    "the change of another step": Bug("multiplier.py", "        return -self.local.change({name: -s for name, s in step.items()})", "        return self.local.change(step)", "test_look_back.py"),
    "more data for a loss that is not quadratic": Bug("trust.py", "if halvings and doubtful and", "if halvings and", TRUST),
    "data of the model that never grow": Bug("trust.py", "self.more * MORE if", "self.more if", TRUST),
    "gradients averaged from the first step": Bug("trust.py", ' or float(self.state["step"]) < FIRST_STEPS', "", f"{TRUST} {RATES}"),
    "a batch asked for its slope is a witness": Bug("rates.py", "promised if due else 0.0", "promised", RATES),
    "a rate that failed is taken again": Bug("averaging.py", 'self._set("pace", Latest(pace=0.0))', "self.take(1.0, 0.0, 0.0)", AVERAGING),
    "rates that never lag": Bug("averaging.py", "return slope < self._latest.slope and", "return False and", AVERAGING),
    "few rows of a large batch": Bug("factors.py", "MIN_SHARE * data, ", "", "test_capture.py"),
    "factors from a quarter of all positions": Bug("factors.py", "MIN_SHARE * data, ", "MIN_SHARE * rows, ", "test_capture.py"),
    "factors of any size for a layer of few parameters": Bug("layers/base.py", " or (size > MAX_UNEVEN and size > UNEVEN * other)", "", "test_report.py"),
    "the last micro-batch believed": Bug("batch.py", "        if self.latest is None or self.latest.is_outweighed(earlier.latest):", "        if self.latest is None:", "test_capture.py"),
    "the second backward pass believed": Bug("batch.py", "latest if self.gradient is None else self.gradient + latest", "latest", "test_capture.py"),
    "the same of several heads": Bug("batch.py", "columns] += some", "columns] = some", "test_capture.py"),
    "a look at derivatives taken for the loss": Bug("batch.py", "is_of_loss, differentiates_again = _reaches(self.trained),", "is_of_loss, differentiates_again = True,", "test_capture.py"),
    "a penalty's derivative kept beside the loss's": Bug("batch.py", "            self.gradient, self.is_makeshift = None, False\n", "            self.is_makeshift = False\n", "test_capture.py"),
    "the gradient of a frozen parameter asked for": Bug("batch.py", " if p.requires_grad)  # some", ")  # some", "test_capture.py"),
    "differences taken for exact slopes": Bug("local_model.py", "is_all and not self._reasons and", "is_all and", "test_quadratic.py"),
    "no targets divided by": Bug("criterion.py", "self.weight / (terms or 1.0)", "self.weight / terms", "test_degenerate.py"),
    "a share of no targets": Bug("local_model.py", "(forward.terms(likelihood) / terms if terms else 1.0)", "forward.terms(likelihood) / terms", "test_degenerate.py"),
    "rows of no data asked for": Bug("capture.py", "(z.requires_grad and z.numel())", "z.requires_grad", "test_degenerate.py"),
    "complex numbers compared": Bug("batch.py", "torch.view_as_real(t) if t.is_complex() else t", "t", "test_degenerate.py"),
    "complex gradients among real ones": Bug("multiplier.py", " if not g.is_complex()}", "}", "test_degenerate.py"),
    "rates that may not rise measured for that": Bug("averaging.py", " and self._latest.pace > self._progress.least\n", "\n", AVERAGING),
    "gradients at shared rows not scaled up from few data": Bug("rerun.py", "call.data, call.upscale = before.data, before.upscale * whole.data / len(chosen)", "call.data, call.upscale = before.data, before.upscale", "test_rerun.py"),
    "several rows of a datum taken for shared ones": Bug("rerun.py", "elif len(call.x) == before.rows:", "elif True:", "test_rerun.py"),
    "a part that did not do tried again": Bug("capture.py", "chosen = None if self._has_parts is False else few(", "chosen = few(", "test_rerun.py"),
    "few data for the noise all counted alike": Bug("noise.py", "counts = (upto[-1] / (ENOUGH * sizes[chosen]))", "counts = (data / ENOUGH + 0 * sizes[chosen])", NOISE),
    "dropout drawn anew": Bug("rerun.py", "if chance is not None:", "if False:", CHANGE),
    "dropout of some of the data": Bug("local_model.py", "apart = forward.chance is None and ", "apart = ", CHANGE),
    "every pass takes its chances": Bug("chance.py", "return None if stayed else self", "return self", CHANGE),
    "classes where they are not": Bug("likelihoods.py", "if sums[1] > DIFFERENT and", "if False and", LOSSES),
    "noise of some data for that of all": Bug("noise.py", "sample.data * lengths", "lengths", NOISE),
    "the largest eigenvalue counted": Bug("damping.py", "(diagonal.sum(-1) - largest) / (size - 1)", "diagonal.sum(-1) / size", "test_damping.py"),
    "a multiplied loss taken for the declared one": Bug("multiplier.py", "        if told:\n            loss = product / scaler\n", "", MULTIPLIER),
    "a gradient scaler taken for a multiplied loss": Bug("multiplier.py", "    if 1 / NOISE < ratio < NOISE:", "    if True:", MULTIPLIER),
    "inputs in containers not restricted": Bug("rerun.py", "leaves, structure = tree_flatten((forward.args, forward.kwargs))", "leaves, structure = tree_flatten((forward.args, forward.kwargs), is_leaf=lambda v: isinstance(v, dict) and v is not forward.kwargs)", "test_rerun.py"),
    "edges to nodes that are left out": Bug("rerun.py", "return value.numel() > 0 and int(value.max()) >= kept", "return False", "test_rerun.py"),
    "a head's weight not in its samples": Bug("joint.py", "lambda one, F, f: F**0.5 * one.sample", "lambda one, F, f: one.sample", JOINT),
    "every head's columns in the first": Bug("joint.py", "[*zeros[:number], F**0.5 * column, *zeros[number + 1 :]]", "[F**0.5 * column, *zeros[1:]]", JOINT),
    "the reach of the bounded heads for all": Bug("joint.py", "                return None\n", "                own = torch.full_like(head, torch.inf)\n", JOINT),
    "only the latest head's gradient": Bug("batch.py", "        if self.gradient is None:\n", "        if True:\n", JOINT),
    "gradients noted at what others were made of": Bug("outputs.py", "        if not here:\n", "        if True:\n", "test_outputs.py"),
    "the gradient looked for at a tensor made for natgrad": Bug("outputs.py", "        if not places or (", "        if True or (", JOINT),
    "an evaluation counted as data": Bug("passes.py", "if self.hears and all(", "if False and all(", "test_capture.py"),
    "a pass whose gradient is still to come dropped": Bug("batch.py", "not self.heard and all(hook() is None for hook in self.hooks)", "not self.heard", "test_capture.py"),
    "a graph in a circle with its calls": Bug("capture.py", "                use.clear()\n", "                pass\n", "test_capture.py"),
    "the curvature of a robust loss that of its middle": Bug("losses.py", "curvature = module.delta / error.clamp(min=module.delta)", "curvature = torch.ones_like(error)", LOSSES),
    "absolute errors of unbounded curvature": Bug("losses.py", "UNNORMALIZED, LEAST_ERROR = 0.02, 0.1", "UNNORMALIZED, LEAST_ERROR = 0.02, 0.0", LOSSES),
    "a target's probabilities for their logarithms": Bug("losses.py", "others[0].exp() if module.log_target else others[0]", "others[0]", LOSSES),
    "what a mask left out counted": Bug("batch.py", "if shares is not None:", "if False:", CHANGE),
    "heads without a label counted": Bug("joint.py", "torch.ones_like(head) if shares is None else shares.expand_as(head)", "torch.ones_like(head)", JOINT),
    "a part of an output taken for a view of all": Bug("outputs.py", " and head.numel() == origin.numel()", "", "test_outputs.py"),
    "a gradient in the order of what was returned": Bug("outputs.py", ".as_strided(shape, stride)", ".reshape(shape)", "test_outputs.py"),
    "a mean over what counts taken for one over all": Bug("criterion.py", 'counted / counted.mean() if self.reduction == "mean" else counted', "counted", CHANGE),
    "outputs of zero taken for masked ones": Bug("likelihoods.py", "((gradient != 0) | (output == 0))", "(gradient != 0)", CHANGE),
    "other layers left out again": Bug("chance.py", "        random.setstate(of_python)\n", "", CHANGE),
    "a pass that draws from Python taken for one that does not": Bug("chance.py", " and self._others == _other_streams()", "", CHANGE),
    "steps that may not raise the declared loss": Bug("quadratic.py", "(0.0 if rest is None else rest.change(c))", "0.0", REST),
    "curvature of a rest not measured": Bug("undeclared.py", "if start == start and", "if False and", REST),
    "where a step began forgotten by a checkpoint": Bug("undeclared.py", "self._keep(PATIENCE, bend, torch.nan if", "self._keep(PATIENCE, bend, torch.nan if True or", REST),
    "rounding taken for a rest": Bug("undeclared.py", "ROUNDING * size", "0.0", REST),
    "no gradients for a network that needs them": Bug("local_model.py", "if torch.is_grad_enabled() or ", "if True or ", "test_rerun.py"),
    "some data that no longer require gradients": Bug("rerun.py", ".requires_grad_(leaf.requires_grad)", "", "test_rerun.py"),
    "a network run on some nodes of a graph": Bug("local_model.py", "        if (returned.shape, output.shape) != (", "        if False and (returned.shape, output.shape) != (", "test_rerun.py"),
    "standing still without a word": Bug("rates.py", "if self.in_a_row == REFUSED:", "if False:", RATES),
    "rounding taken for a loss that is not known": Bug("rates.py", "promised > MEANT * self.most", "promised > 0", RATES),
    "other data's outputs taken for theirs": Bug("local_model.py", "        return not apart or any", "        return True or any", "test_rerun.py"),
    "a step judged before the scaler is known": Bug("preconditioner.py", "            if finite:  # first,", "            if stands is not None and not stands(self.multiplier, finite):\n                return False\n            if finite:  # first,", MULTIPLIER),
    "single data's gradients with the scaler's factor": Bug("noise.py", "(rows[1].shape[-3] * scaler**2)", "rows[1].shape[-3]", MULTIPLIER),
    "the empirical Fisher of the multiplied loss": Bug("batch.py", "(R * self.multiplier**2)", "R", MULTIPLIER),
    "a scaler that comes late overlooked": Bug("multiplier.py", "is_seen and 1 / NOISE < growth < NOISE and", "is_seen and", MULTIPLIER),
    "a pass at every step for a scaler that stays": Bug("multiplier.py", "        if product != 1 and self._is_steady(product / before):", "        if False:", MULTIPLIER),
    "a scaler never looked at again": Bug("multiplier.py", ' and float(self.state["step"]) % EVERY != 0', "", MULTIPLIER),
    "soft targets taken for labels": Bug("multiplier.py", "variety > max(VARIETY, EVIDENCE * (1 - low / top))", "True", MULTIPLIER),
    "a step too long left as it is": Bug("multiplier.py", "        return factor <= 1\n", "        return True\n", f"{MULTIPLIER} test_robustness.py"),
    "a module's multiplier overlooked": Bug("capture.py", "value.register_hook(forward.add_multiplier)", "pass", MULTIPLIER),
    "inverses that waited computed anew": Bug("metric.py", "if state.get(MOVED, True)", "if True", RESUME),
    "factors cast to the parameter's dtype": Bug("loading.py", 'if group["fallback"] else arrived[p]', "if True else arrived[p]", "test_optimizer_contracts.py"),
    "state that only training creates": Bug("state.py", '["noise"] if sampling else []', "[]", RESUME),
    "multipliers of the network left with a layer": Bug("state.py", "        state[after[0].parameters[0]].update(shared)\n", "", GROUPS),
    "overflowing batches kept": Bug("passes.py", "            self._earlier = None\n", "            pass\n", "test_mixed_precision.py"),
    "accumulated batches dropped": Bug("passes.py", "and not any(is_there(p.grad) for p in parameters)", "", "test_mixed_precision.py"),
    "rates of groups ignored": Bug("groups.py", "rate / top if top else 1.0", "1.0", GROUPS),
    "clipped by the largest rate": Bug("clipping.py", " * rates[p] ** 2", "", GROUPS),
    "hooks that outlive their optimizer": Bug("preconditioner.py", "        weakref.finalize(self, self.capture.close).atexit = False\n", "", COPIES),
    "a copied model gathers": Bug("capture.py", '{"attached": False, "_calls": None}', 'dict(self.__dict__)', COPIES),
    "a checksum that is not looked at": Bug("checkpoint.py", "!= _digest(file, length)", "is None", "test_checkpoint.py"),
    "a difference that is not divided by its distance": Bug("derivatives.py", "return change / epsilon if", "return change if", "test_derivatives.py"),
    "differences in double precision": Bug("derivatives.py", "p.dtype == torch.float32 and", "", "test_derivatives.py"),
    "differences below rounding": Bug("derivatives.py", "if change.norm() > least * before.norm() else None", "", "test_derivatives.py"),
    "differences below the rounding of derivatives": Bug("derivatives.py", "if differentiates() else", "if False else", "test_derivatives.py"),
    "no dual numbers": Bug("derivatives.py", "            return by_dual_numbers(output, parameters, direction)\n", "            raise RuntimeError\n", "test_derivatives.py"),
    "a use of the transposed weight taken for one of the weight": Bug("own_derivatives.py", "(use, True)", "(use, False)", OWN),
    "derivatives that go round in one direction": Bug("own_derivatives.py", "(use.inner, not use.transposed)", "(use.inner, use.transposed)", OWN),
    "hooks that stay on the user's input": Bug("own_derivatives.py", "            handle.remove()\n", "            pass\n", OWN),
    "further derivatives unseen": Bug("own_derivatives.py", "        self.follow(again, entered, left)\n", "", OWN),
    "a bias in derivatives": Bug("calls.py", "float(layer.has_bias)", "1.0", OWN),
    "rows of a transposed use at their own places": Bug("calls.py", "(g, x) if owner.swaps(layer) else (x, g)", "(x, g)", OWN),
    "a step on the same batch judged by the model alone": Bug("rates.py", "if Trust(multiplier.state).averages:", "if False:", "test_look_back.py"),
    "every batch taken for the same": Bug("multiplier.py", "seen is not None and torch.equal(seen, inputs)", "True", "test_look_back.py"),
    "inputs in another order taken for the same": Bug("batch.py", "float((some * torch.arange(place, place + len(some), device=some.device).sin()).sum())", "float(some.sum())", "test_look_back.py"),
    "a network's own pass taken for the user's": Bug("capture.py", "if self._calls is not None:  # the network's own pass", "if False:", OWN),
    "the shorter head's mean over the longer's data": Bug("joint.py", "numbers = self.lengths or [len(joined)] * len(columns)", "numbers = [len(joined)] * len(columns)", "test_ragged.py"),
    "some rows of heads of different data": Bug("local_model.py", " and not forward.lengths", "", "test_ragged.py"),
    "a reach of some rows of heads of different data": Bug("multiplier.py", "data if forward.lengths else min", "min", "test_ragged.py"),
    "data of one head alone sampled": Bug("capture.py", "in (forward.data, *forward.lengths)", "== forward.data", "test_ragged.py"),
    "what modules note is a second pass's": Bug("rerun.py", "            attributes.update(kept)\n", "            pass\n", SIDE),
    "lists keep what a second pass put in": Bug("rerun.py", "            value.clear()\n", "            pass\n", SIDE),
    "new attributes stay": Bug("rerun.py", "                del attributes[name]\n", "                pass\n", SIDE),
    "aliases of modules left to torch": Bug("rerun.py", "tie_weights=False", "tie_weights=True", SIDE),
    "a tied weight moved in one place": Bug("rerun.py", "{**tensors, **copies}.items() for place in at[name]}", "{**tensors, **copies}.items() for place in at[name][:1]}", "test_rerun.py"),
    "hooks of others see some of the data": Bug("capture.py", "if chosen is None or self._is_watched():", "if chosen is None:", SIDE),
    "calls of a forward pass that failed stay": Bug("capture.py", "self._calls = self._chance = None\n\n    def record", "pass\n\n    def record", SIDE),
    "curvature enters another's step": Bug("curvature.py", "stack.enter_context(owner.aside())", "pass", SIDE),
    "stand-ins leave in the order they came": Bug("layers/attention.py", "            if not self._holders:\n                nn.functional.linear = self._original", "            if self._holders:\n                nn.functional.linear = self._original", SIDE),
    "the first watcher of attention sees nothing": Bug("layers/attention.py", "for one in _here.looking:", "for one in _here.looking[-1:]:", SIDE),
    "a subclass taken for its base": Bug("layers/base.py", "return own and kind is not", "return kind is not", "test_report.py"),
    "attention's projection taken for a layer": Bug("layers/base.py", "return own and kind is not NonDynamicallyQuantizableLinear", "return own", "test_report.py"),
    "what the rates leave of a step is looked back at": Bug("rates.py", "        return [downhill, *onward, *([self.back] if self.previous else [])]", "        return [downhill, *onward, *([self._named(self.onward)] if self.previous else [])]", GROUPS),
    "steps of uneven rates go on by another part": Bug("optimizer.py", "velocity.add_(onward[parameter], alpha=mu)", "velocity.add_(self.state[parameter][\"velocity\"], alpha=mu)", f"{GROUPS} test_optimizer.py"),
    "a state of what is not trained": Bug("optimizer.py", "\"velocity\" in self.state.get(parameter, {})", "\"velocity\" in self.state[parameter]", RESUME),
    "nothing told of what was unfrozen": Bug("optimizer.py", "if p.grad is not None and p not in trained]", "if False]", GROUPS),
    "told of layers that were added": Bug("optimizer.py", "if p.grad is not None and p not in trained]", "if p.grad is not None]", GROUPS),
    "an inverse of another kind stays": Bug("metric.py", "for key in OF_ANY - set(held):", "for key in set(self.inverse.names) - set(held):", RESUME),
    "a factor loaded as a rate": Bug("loading.py", "if group.get(AUTOMATIC, mine[AUTOMATIC]) != mine[AUTOMATIC]:", "if False:", RESUME),
    "jumps taken for slopes": Bug("derivatives.py", "jumps = smooth.is_refuted\n        if jumps", "jumps = False\n        if jumps", "test_derivatives.py"),
    "smoothness looked at once": Bug("derivatives.py", "seen == 1 and", "False and", "test_derivatives.py"),
    "clipping taken for a scaler": Bug("multiplier.py", "if abs(exponent - round(exponent)) < POWER:", "if True:", "test_clipping.py"),
    "terms of a rank compared with the mean": Bug("local_model.py", "(self.ranks.part * self.ranks.world.size or 1.0)", "1.0", "test_distributed.py"),
    "narrow inputs multiplied with wide weights": Bug("rerun.py", "needed = all(p.dtype not in HALF for p in model.parameters())", "needed = False", "test_mixed_precision.py"),
    "heads cut as the latest were": Bug("capture.py", "= copy(self.loss.likelihood), modes", "= self.loss.likelihood, modes", JOINT),
    "the target taken for the variance": Bug("capture.py", "tuple(named[name] for name in ARGUMENTS[1:] if name in named)", "tuple(named.values())", LOSSES),
    "an age sent with the rest": Bug("exchange.py", "sent = [name for name in names if not name.endswith(\"_age\")]", "sent = list(names)", "test_exchange.py"),
    "an empty second pass": Bug("curvature.py", "if ekfac and isinstance(batches, Iterator):", "if False:", EKFAC),
    "one overflow ends the cheap passes": Bug("capture.py", "if part is not None or forward.output.isfinite().all():", "if True:", "test_rerun.py"),
    "another loss than cross-entropy not told of": Bug("likelihoods.py", "if sums[1] > DIFFERENT and self.of_logits:", "if False:", LOSSES),
    "log-probabilities told to be another loss": Bug("likelihoods.py", "of_logits = False", "of_logits = True", LOSSES),
    "another compression refused": Bug("experiments/mnist.py", "if cached.is_file() and _unpacked_md5(cached) == MD5_UNPACKED[name]:", "if False:", "experiments/test_mnist.py"),
    "outputs of another mode taken for those here": Bug("local_model.py", " and modes(self.model) == self.forward.modes:", ":", "test_quadratic.py"),
    "outputs of another state taken for those here": Bug("local_model.py", "elif not self.repeats.is_refuted:", "else:", "test_quadratic.py"),
    "decay by a factor that may be negative": Bug("optimizer.py", "math.exp(-alpha * shares[parameter] * decays[parameter])", "1 - alpha * shares[parameter] * decays[parameter]", GROUPS),
    "parameters that a network cannot differentiate by": Bug("local_model.py", "p if p.requires_grad else p.detach().requires_grad_()", "p", "test_rerun.py"),
    "smoothed labels refused among several": Bug("losses.py", "indispensable = options or weighs_always", "indispensable = options or weighs_always or bool(getattr(module, 'label_smoothing', 0))", JOINT),
    "nothing but what was frozen is looked at": Bug("optimizer.py", "if p.grad is not None and p not in trained]", "if p.grad is not None and p not in trained and not name.startswith('3')]", GROUPS),
    "gradients of all parameters looked at": Bug("preconditioner.py", "if self.trained is None or p in self.trained}", "if True}", GROUPS),
    "inputs widened for some of the weights": Bug("rerun.py", "needed = all(p.dtype not in HALF for p in model.parameters())", "needed = True", "test_mixed_precision.py"),
    "a pass left out that shows how far to look": Bug("local_model.py", "if self._differentiates:  # that is seen", "if False:  # that is seen", "test_quadratic.py"),
    "half a record left": Bug("experiments/runfolder.py", "                file.truncate(length)\n", "", "experiments/test_runfolder_faults.py"),
}  # fmt: skip


def survives(bug: Bug) -> str | None:
    """None if a test fails for it, or why it is still alive."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "natgrad"
        shutil.copytree(ROOT / "src" / "natgrad", copy)
        path = copy / bug.file
        text = path.read_text(encoding="utf-8")
        if bug.right not in text:
            return "its place is gone"
        path.write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")
        tests = [str(ROOT / "tests" / name) for name in bug.tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return None if done.returncode == 1 else f"SURVIVES ({done.stdout.strip().splitlines()[-1:]})"


def main() -> int:
    """Plant them all, or those named."""
    chosen = {name: BUGS[name] for name in sys.argv[1:]} or BUGS
    alive = 0
    for name, bug in chosen.items():
        reason = survives(bug)
        alive += reason is not None
        print(f"{name:48} {bug.tests:45} {reason or 'killed'}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} killed")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
