"""When a training does not fit into memory: how that is told from other errors, and what to lower."""

from __future__ import annotations

from .options import TrainingOptions


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is used up: CUDA's, cuBLAS's or the CPU's, which has no class of its own."""
    words = str(error).lower()
    return any(said in words for said in ("can't allocate memory", "out of memory", "status_alloc_failed"))


def advice(options: TrainingOptions) -> str:
    """What to lower, the mildest first."""
    if options.batch_size > 1:
        parts = next(n for n in range(2, options.batch_size + 1) if options.batch_size % n == 0)
        batch_size, accumulation = options.batch_size // parts, options.accumulation * parts
        return f"Set batch_size {batch_size} and accumulation {accumulation}, which trains the same, and resume."
    if not options.gradient_checkpointing:
        return "Turn gradient_checkpointing on and resume."
    if options.optimizer != "adamw8bit":
        return "Choose optimizer adamw8bit in a new run, or kind control_lora."
    return "Choose kind control_lora, or a dataset of a lower resolution."
