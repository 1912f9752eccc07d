"""Exact search: a blocked scan of all keys in float32."""

from __future__ import annotations

from typing import ClassVar

from lightning_fot.retrievers.base import Retriever


class ExactRetriever(Retriever):
    """Scores every key: the reference the others are measured against, and the fastest below about 8k keys a bank.

    Args:
        dim: Head size D.
        banks: Independent key sets.
        **kwargs: Those of :class:`Retriever`; none changes the result.

    Example:
        >>> import torch
        >>> retriever = ExactRetriever(dim=2)
        >>> retriever.add(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]))
        >>> retriever.search(torch.tensor([[[1.0, 0.1]]]), k=2).tolist()
        [[[0, 2]]]
    """

    exact: ClassVar[bool] = True
