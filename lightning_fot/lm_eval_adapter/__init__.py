"""The model ``lightning-fot`` of EleutherAI's lm-evaluation-harness (extra ``lm-eval``)."""

from lightning_fot.lm_eval_adapter.adapter import MemoryHarness

__all__ = ["MemoryHarness"]
