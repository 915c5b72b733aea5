"""Nearest keys of very large pools, by FAISS (an extra: `pip install "peft-cl[faiss]"`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F


#: HNSW (Malkov & Yashunin 2018, arXiv 1603.09320): links of a key, and how many candidates building and search keep.
LINKS, BUILD, SEARCH = 32, 100, 128


def check_faiss() -> None:
    """Refuse to search by FAISS where it is not installed."""
    if find_spec("faiss") is None:
        raise ValueError(
            "search is 'faiss', but FAISS is not installed. Install it with `pip install \"peft-cl[faiss]\"`, or set "
            "search='exact'."
        )


class KeyIndex:
    """Approximate nearest keys by a graph (HNSW) over each key set, built anew when the keys have changed.

    Kept for evaluation: in training keys move with each step, and their terms need all similarities anyway.

    Example:
        >>> index = KeyIndex()
        >>> query, keys = torch.randn(4, 384), torch.randn(1, 50_000, 384)
        >>> index.nearest(query, keys, 5, "cosine", stamp=0).shape                  # doctest: +SKIP
        torch.Size([1, 4, 5])
    """

    def __init__(self):
        self._stamp: Any = None
        self._graphs: list[Any] = []

    def nearest(self, query: torch.Tensor, keys: torch.Tensor, count: int, kind: str, stamp: Any) -> torch.Tensor:
        """The `count` keys that are most similar to each query, best first.

        Args:
            query: (B, D).
            keys: (sets, M, D).
            kind: `"cosine"` or `"dot"`.
            stamp: something that changes whenever the keys do.

        Returns:
            (sets, B, count) int64 rows, on the query's device.
        """
        if stamp != self._stamp or not self._graphs:
            self._graphs = [self._graph(rows, kind) for rows in keys.detach()]
            self._stamp = stamp
        query = F.normalize(query, dim=-1) if kind == "cosine" else query
        points = query.detach().float().cpu().contiguous().numpy()
        found = [torch.from_numpy(graph.search(points, count)[1]) for graph in self._graphs]
        return torch.stack(found).to(query.device)

    @staticmethod
    def _graph(keys: torch.Tensor, kind: str) -> Any:
        import faiss

        keys = F.normalize(keys, dim=-1) if kind == "cosine" else keys
        graph = faiss.IndexHNSWFlat(keys.shape[-1], LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = BUILD, SEARCH
        graph.add(keys.float().cpu().contiguous().numpy())
        return graph

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a pool, on disk or in memory, build their own."""
        return {"_stamp": None, "_graphs": []}
