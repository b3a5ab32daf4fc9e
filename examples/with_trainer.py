"""natgrad in Hugging Face's ``Trainer``: ``optimizers=(optimizer, scheduler)``, on a small GPT-2 made here.

The model computes its own loss, of the logits moved by one position: ``output=`` shows natgrad what that loss sees.
``Trainer`` clips gradients to a length of 1 by default, which shortens steps; natgrad has a check of its own.
"""

import sys

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

import natgrad

LENGTH, TOKENS = 16, 12


class Sums(Dataset[dict[str, Tensor]]):
    """Sequences in which each token is the sum of the two before it, modulo their number."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(TOKENS, (count,), generator=generator) for _ in range(2)]
        while len(tokens) < LENGTH:
            tokens.append((tokens[-1] + tokens[-2]) % TOKENS)
        self.sequences = torch.stack(tokens, 1)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.sequences[index], "labels": self.sequences[index]}


def predictions(out: CausalLMOutputWithCrossAttentions) -> Tensor:
    """(N, classes, positions), without the last position, which has no next token."""
    return out.logits[:, :-1].transpose(1, 2)


class Diagnostics(TrainerCallback):
    """What the latest step did, as scalars for TensorBoard."""

    def __init__(self, optimizer: natgrad.KFAC, folder: str) -> None:
        self.optimizer, self.writer = optimizer, SummaryWriter(folder)

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Called by ``Trainer``."""
        for key, value in self.optimizer.diagnostics(per_layer=False).items():
            self.writer.add_scalar(f"kfac/{key}", value, state.global_step)


def main(folder: str) -> float:
    """Mean loss of the last steps."""
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=TOKENS, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2, **dropout)
    model = GPT2LMHeadModel(config)
    optimizer = natgrad.KFAC(model, loss="cross_entropy", output=predictions)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=60,
        per_device_train_batch_size=32,
        max_grad_norm=0.0,  # no clipping
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data, callback = Sums(2000, seed=0), Diagnostics(optimizer, folder)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback])
    trainer.train()
    return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


if __name__ == "__main__":
    print(f"loss {main(sys.argv[1] if len(sys.argv) > 1 else 'runs/trainer'):.3f}")
