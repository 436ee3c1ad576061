"""LoRAs made of others or of fine-tunings: sums, singular values, other ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from functional_sd3.core import tree
from functional_sd3.core.types import Params
from functional_sd3.lora import keys as lora_keys
from functional_sd3.lora import tree as adapters
from functional_sd3.lora.tree import Adapter, Lora, LoraEntry

Weight = float | Tensor


def combine(loras: Sequence[Lora], weights: Sequence[Weight] | None = None) -> Lora:
    """One LoRA that is the weighted sum of several (weights are 1 by default); its ranks are the sums of theirs.

    Where one is no low-rank product, the sum is a difference of the whole weight. Raises ValueError for DoRAs.
    """
    if not loras:
        raise ValueError("combine needs at least one LoRA")
    weights = [1.0] * len(loras) if weights is None else list(weights)
    if len(weights) != len(loras):
        raise ValueError(f"{len(weights)} weights do not fit {len(loras)} LoRAs")
    entries_by_path: dict[str, list[tuple[LoraEntry, Weight]]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for path, entry in adapters.entries(lora).items():
            entries_by_path.setdefault(path, []).append((entry, weight))
    return adapters.build({path: _sum(pairs) for path, pairs in entries_by_path.items()})


def extract(tuned: Params, base: Params, rank: int, *, targets: tree.Chooser = "*") -> Lora:
    """The LoRA nearest to what distinguishes `tuned` from `base`: truncated singular values of every matrix's change.

    By Eckart and Young no LoRA of this rank is nearer in the Frobenius norm; at full rank it is the change itself.
    Query, key and value are taken each for itself, matrices that did not change are left out, alpha is the rank. Leaves
    that are no matrix of a layer (biases, norms, embeddings) are not in a LoRA: `weights.merge.diff` shows what is
    lost. Raises ValueError when the trees differ in structure, when nothing differs, or for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    before = tree.flatten_paths(base)
    tree.map(lambda one, other: None, tuned, base)
    chosen = {path: leaf for path, leaf in tree.select(tuned, targets).items() if lora_keys.adaptable(path, leaf.ndim)}
    entries: dict[str, LoraEntry] = {}
    for path, count in lora_keys.parts(chosen).items():
        wide = torch.promote_types(chosen[path].dtype, torch.float32)
        change = chosen[path].detach().to(wide) - before[path].detach().to(chosen[path].device, wide)
        if not torch.isfinite(change).all():
            raise ValueError(f"{path} has values that are not finite")
        if change.any():
            split = [_truncated(part, rank) if part.any() else {} for part in change.chunk(count)]
            entries[path] = split if count > 1 else split[0]
    if not entries:
        raise ValueError(f"no weight that a LoRA can adapt differs between the two, among {len(chosen)} chosen")
    return adapters.build(entries)


def resize(lora: Lora, rank: int) -> Lora:
    """The nearest LoRA of another rank: singular values cut off, or zeros added; alpha becomes the rank.

    Entries that are no low-rank product (LoHa, LoKr, differences of matrices) become one. Raises ValueError for a DoRA.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")

    def resized(entry: LoraEntry) -> LoraEntry:
        if not isinstance(entry, dict):
            return [resized(part) if part else {} for part in entry]
        if adapters.is_low_rank(entry):
            return _resized(entry, rank)
        change = adapters.product(entry)
        return _truncated(change, rank) if change.ndim > 1 else entry

    return adapters.build({path: resized(entry) for path, entry in adapters.entries(lora).items()})


def _sum(weighted: Sequence[tuple[LoraEntry, Weight]]) -> LoraEntry:
    if not all(adapters.is_low_rank(entry) for entry, _ in weighted):
        return {"diff": sum(adapters.product(entry) * weight for entry, weight in weighted)}
    lists = [entry for entry, _ in weighted if not isinstance(entry, dict)]
    if not lists:
        return _sum_of_adapters(weighted)
    columns = zip(*[adapters.separate(entry, len(lists[0])) for entry, _ in weighted], strict=True)
    scales = [scale for _, scale in weighted]
    return [_sum_of_adapters([pair for pair in zip(column, scales, strict=True) if pair[0]]) for column in columns]


def _sum_of_adapters(weighted: Sequence[tuple[Adapter, Weight]]) -> Adapter:
    if not weighted:
        return {}
    down = torch.cat([adapter["down"] for adapter, _ in weighted])
    up = torch.cat([adapter["up"] * (adapters.scaling(adapter) * scale) for adapter, scale in weighted], dim=1)
    return {"down": down, "up": up, "alpha": weighted[0][0]["alpha"].new_tensor(float(len(down)))}


def _truncated(change: Tensor, rank: int) -> Adapter:
    left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    return _from_svd(left, values, right, min(rank, len(values)), change.shape[1:])


def _from_svd(left: Tensor, values: Tensor, right: Tensor, rank: int, inputs: Sequence[int]) -> Adapter:
    roots = values[:rank].sqrt()
    down = (roots[:, None] * right[:rank]).unflatten(1, tuple(inputs))
    return {"down": down, "up": left[:, :rank] * roots, "alpha": values.new_tensor(float(rank))}


def _resized(adapter: Adapter, rank: int) -> Adapter:
    dtype = adapter["down"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    # The singular values of a product are those of its small core: two thin QR decompositions, and a rank x rank SVD.
    left, core = torch.linalg.qr(adapter["up"].to(wide) * adapters.scaling(adapter).to(wide))
    right, other = torch.linalg.qr(adapter["down"].to(wide).flatten(1).T)
    inner, values, outer = torch.linalg.svd(core @ other.T, full_matrices=False)
    kept = min(rank, len(values))
    smaller = _from_svd(left @ inner, values, outer @ right.T, kept, adapter["down"].shape[1:])
    zeros = {"down": (rank - kept, *smaller["down"].shape[1:]), "up": (len(smaller["up"]), rank - kept)}
    padded = {
        name: torch.cat([smaller[name], smaller[name].new_zeros(shape)], dim=0 if name == "down" else 1).to(dtype)
        for name, shape in zeros.items()
    }
    return {**padded, "alpha": adapter["alpha"].new_tensor(float(rank))}
