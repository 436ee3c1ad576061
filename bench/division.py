"""Memory of one process of several that compute a transformer together.

    torchrun --nproc-per-node 2 -m bench.division sequence=2
    python -m bench.division

Prints, for four blocks of width 256 and 1,024 image tokens, the bytes of the parameters of a process and the most that
it holds beside them: for a velocity, and for gradients with rematerialised blocks. Of the process that holds most.
"""

import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from bench.timing import allocated_peak
from functional_sd3 import mmdit
from functional_sd3.core import prng, transform, tree
from functional_sd3.parallel import mesh as meshes
from functional_sd3.parallel import tensor
from functional_sd3.parallel.collectives import all_gather
from functional_sd3.parallel.mesh import Mesh

CONFIG = mmdit.Config(
    depth=4, heads=4, context_width=256, pooled_width=256, position_size=32, qk_norm=True, dual_attention_layers=(0, 1)
)


def measured(mesh: Mesh) -> list[int]:
    """Bytes of the parameters, of a velocity and of gradients."""
    spec = mmdit.spec(CONFIG)
    params = tensor.cut(mmdit.init(prng.key(0), CONFIG), spec, mesh, heads=CONFIG.heads)
    latents, context = prng.normal(prng.key(1), (1, 16, 64, 64)), prng.normal(prng.key(2), (1, 154, 256))
    arguments = latents, torch.tensor(0.5), context, prng.normal(prng.key(3), (1, 256))

    def velocity(params: tree.Tree, **options: object) -> torch.Tensor:
        return mmdit.apply(params, CONFIG, *arguments, mesh=mesh, **options)

    def loss(params: tree.Tree) -> torch.Tensor:
        return velocity(params, block_transform=transform.remat).square().mean()

    with torch.no_grad():
        forward = allocated_peak(lambda: velocity(params))
    return [tree.nbytes(params), forward, allocated_peak(lambda: torch.func.grad(loss)(params))]


def main(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    mesh = meshes.init(meshes.parse(words[0]) if words else {})
    largest = all_gather(torch.tensor([measured(mesh)]), mesh.group()).amax(0)
    if mesh.rank == 0:
        cells = " | ".join(f"{number / 2**20:,.1f}" for number in largest.tolist())
        print(f"| {words[0] if words else 'one process'} | {cells} |")  # noqa: T201
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
