"""How a step is computed, as section `execution` says it; model/compute/execution.py acts on it. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.bounds import Count, Positive


@dataclass(frozen=True)
class ExecutionParams:
    """Section `execution`.

    `micro_batch`: rows of one forward with gradient, `rollout_batch`: rows of one without; 0 takes what fits into the
    free memory. `precision`: "fp32", or "bf16" for the networks' arithmetic (weights that train, latents and Euler
    steps stay fp32). `compile`: torch.compile for one block of each kind, "rollout" only where the student is rolled
    out, "blocks" everywhere (a teacher that equals the student then answers the same up to rounding). `attention`: a
    kernel of torch's scaled_dot_product_attention. `checkpointing`: recompute activations in the backward; "auto" only
    where one row does not fit otherwise.
    `merge_rollout`: add the student's adapter into its weights while it is rolled out; "auto" in fp32 alone, because in
    bf16 it moves the states. `processes`: data-parallel processes on this machine. `shard_base`: spread the frozen
    base's weights over them (FSDP2).
    """

    device: Literal["auto", "cpu", "cuda"]
    processes: Positive
    micro_batch: Count
    rollout_batch: Count
    precision: Literal["fp32", "bf16"]
    compile: Literal["none", "rollout", "blocks"]
    attention: Literal["auto", "math", "efficient", "flash", "cudnn"]
    checkpointing: Literal["auto", "always", "never"]
    merge_rollout: Literal["auto", "always", "never"]
    shard_base: bool

    def faults(self) -> list[str]:
        if self.shard_base and self.processes < 2:
            return [f"shard_base = true: needs processes of 2 or more, have {self.processes}"]
        return []
