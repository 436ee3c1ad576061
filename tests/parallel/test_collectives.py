"""Collectives and every derivative through them equal one process that has all tensors."""

from functools import partial

import pytest
import torch
from torch.func import grad, jvp, vmap

from functional_sd3.core import prng, transform
from functional_sd3.parallel import collectives, mesh

ROWS, COLUMNS = 4, 8


def all_gather(x, group, count):
    return collectives.all_gather(x, group, 1)


def reduce_scatter(x, group, count):
    return collectives.reduce_scatter(x, group, -1)


def all_to_all(x, group, count):
    return collectives.all_to_all(x, group, 1, 0)


def uneven_all_to_all(x, group, count):
    sizes = [COLUMNS - count + 1, *[1] * (count - 1)]
    exchanged = collectives.all_to_all(x, group, 1, 0, split_sizes=sizes)
    # And back: now the rows are equal and the columns are not.
    return exchanged.sin() if count == 1 else collectives.all_to_all(exchanged, group, 0, 1, join_sizes=sizes).sin()


def uneven(x, group, count):
    """Parts of sizes 0, 1, 2, ... of a sum, and back."""
    sizes = [*range(count - 1), COLUMNS - sum(range(count - 1))]
    part = collectives.reduce_scatter(x, group, 1, sizes=sizes)
    return collectives.all_gather(torch.sin(part), group, 1, sizes=sizes)


def psum(x, group, count):
    return collectives.broadcast(collectives.psum(x, group), group)


COLLECTIVES = {fn.__name__: fn for fn in (all_gather, reduce_scatter, all_to_all, uneven_all_to_all, uneven, psum)}

# The same of the tensors of all processes, (processes, rows, columns) -> one result a process.


def joined(x, dim):
    return torch.cat(x.unbind(0), dim)


ONE_PROCESS = {
    "all_gather": lambda x: [joined(x, 1)] * len(x),
    "reduce_scatter": lambda x: x.sum(0).chunk(len(x), -1),
    "all_to_all": lambda x: [joined(part, 0) for part in x.chunk(len(x), 2)],
    "uneven_all_to_all": lambda x: x.sin(),
    "uneven": lambda x: [x.sum(0).sin()] * len(x),
    "psum": lambda x: [x.sum(0)] * len(x),
}


def weighted(y, rank):
    return (torch.cos(y) * torch.arange(1, 1 + y.numel()).view(y.shape).sin()).sum() * (rank + 1)


def compositions(loss, x, tangent, many):
    """Derivatives of `loss`, all of whose functions take what each process has."""
    tracked = x.clone().requires_grad_()
    return {
        "value": loss(x),
        "autograd": torch.autograd.grad(loss(tracked), tracked)[0],
        "grad": grad(loss)(x),
        "jvp": jvp(loss, (x,), (tangent,))[1],
        "hvp": transform.hvp(loss, x, tangent),
        "grad(grad)": grad(lambda x: (grad(loss)(x) * tangent).sum())(x),
        "vmap": vmap(loss)(many),
        "vmap of the last axis": vmap(loss, in_dims=-1)(many.movedim(0, -1)),
        "vmap(grad)": vmap(grad(loss))(many),
        "vmap(jvp)": vmap(lambda x: jvp(loss, (x,), (tangent,))[1])(many),
        "grad(vmap)": grad(lambda many: vmap(loss)(many).sum())(many),
        "vmap(vmap)": vmap(vmap(loss))(torch.stack([many, many + 1])),
    }


def inputs(count):
    x, tangent = (prng.normal(prng.key(seed), (count, ROWS, COLUMNS), torch.float64) for seed in (0, 1))
    return x, tangent, prng.normal(prng.key(2), (count, 3, ROWS, COLUMNS), torch.float64)


def derivatives(name):
    """In each process: all compositions of the collective."""
    grid = world()
    x, tangent, many = (value[grid.rank] for value in inputs(grid.size()))

    def loss(x):
        return weighted(COLLECTIVES[name](x, grid.group(), grid.size()), grid.rank)

    return compositions(loss, x, tangent, many)


def world():
    import os

    return mesh.init({"data": int(os.environ["WORLD_SIZE"])})


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_every_derivative_equals_that_of_one_process(processes, name, count):
    ours = processes(count, derivatives, name)
    x, tangent, many = inputs(count)

    def losses(x):
        return torch.stack([weighted(y, rank) for rank, y in enumerate(ONE_PROCESS[name](x))])

    def total(x):
        return losses(x).sum()

    expected = {
        "value": losses(x),
        "grad": grad(total)(x),
        "jvp": jvp(losses, (x,), (tangent,))[1],
        "hvp": transform.hvp(total, x, tangent),
        "vmap": vmap(losses, in_dims=1, out_dims=1)(many),
        "vmap(grad)": vmap(grad(total), in_dims=1, out_dims=1)(many),
        "vmap(jvp)": vmap(lambda x: jvp(losses, (x,), (tangent,))[1], in_dims=1, out_dims=1)(many),
        "vmap(vmap)": torch.stack([vmap(losses, in_dims=1, out_dims=1)(some) for some in (many, many + 1)], 1),
    }
    expected["autograd"], expected["grad(grad)"] = expected["grad"], expected["hvp"]
    expected["vmap of the last axis"], expected["grad(vmap)"] = expected["vmap"], expected["vmap(grad)"]
    for rank, result in enumerate(ours):
        for composition, value in result.items():
            wanted = expected[composition][rank]
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12, msg=partial("{} {}".format, composition))


def replicated_loss():
    """A layer divided by hidden units (Megatron's): the loss is the same on all processes."""
    grid = world()
    first, second, x = megatron(grid.size())
    shard = slice(grid.rank * 3, grid.rank * 3 + 3)

    def loss(x, first, second):
        hidden = torch.tanh(collectives.broadcast(x, grid.group()) @ first)
        return collectives.psum(hidden @ second, grid.group()).square().sum()

    arguments = x, first[:, shard], second[shard]
    return grad(loss, (0, 1, 2))(*arguments), jvp(loss, arguments, arguments)[1]


def megatron(count):
    shapes = (5, 3 * count), (3 * count, 5), (2, 5)
    return [prng.normal(prng.key(seed), shape, torch.float64) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("count", [2, 4])
def test_a_loss_that_is_the_same_everywhere_is_differentiated_once(processes, count):
    first, second, x = megatron(count)

    def loss(x, first, second):
        return (torch.tanh(x @ first) @ second).square().sum()

    wanted, tangent = grad(loss, (0, 1, 2))(x, first, second), jvp(loss, (x, first, second), (x, first, second))[1]
    for rank, (ours, our_tangent) in enumerate(processes(count, replicated_loss)):
        shard = slice(rank * 3, rank * 3 + 3)
        torch.testing.assert_close(ours, (wanted[0], wanted[1][:, shard], wanted[2][shard]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(our_tangent, tangent, rtol=1e-12, atol=1e-12)


DTYPES = [torch.bool, torch.int64, torch.uint8, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]


def movements():
    """Collectives of every dtype, of large tensors, of empty ones and of scalars."""
    grid = world()
    group, rank, count = grid.group(), grid.rank, grid.size()
    moved = []
    for dtype in DTYPES:
        x = (torch.arange(3 * count).view(3, count) % 2 + rank).to(dtype)
        moved.append((collectives.all_gather(x, group), collectives.all_to_all(x, group, 1, 0)))
        moved.append(collectives.broadcast_from(x, group, 1))
    large = prng.normal(prng.key(rank), (150_001,))
    sums = collectives.psum(large, group), collectives.psum(torch.tensor(rank + 1), group)
    half = collectives.psum(large.bfloat16(), group)
    empty = collectives.all_gather(torch.zeros(0, 3), group), collectives.psum(torch.zeros(0), group)
    scattered = collectives.reduce_scatter(torch.full((count,), rank + 1, dtype=torch.int32), group)
    return moved, sums, half, empty, scattered


def test_every_dtype_is_moved_and_sums_are_taken_in_the_order_of_the_processes(processes, same):
    count = 4
    all_of_them = processes(count, movements)
    for rank, (moved, sums, half, empty, scattered) in enumerate(all_of_them):
        wanted = []
        for dtype in DTYPES:
            xs = [(torch.arange(3 * count).view(3, count) % 2 + other).to(dtype) for other in range(count)]
            columns = [x[:, rank : rank + 1].contiguous() for x in xs]
            wanted += [(torch.cat(xs), torch.cat(columns)), xs[1]]
        assert same(moved, wanted)
        large = [prng.normal(prng.key(other), (150_001,)) for other in range(count)]
        assert torch.equal(sums[0], ((large[0] + large[1]) + large[2]) + large[3]) and sums[1] == 10
        narrow = [x.bfloat16().float() for x in large]
        assert torch.equal(half, (((narrow[0] + narrow[1]) + narrow[2]) + narrow[3]).bfloat16())
        assert [x.shape for x in empty] == [(0, 3), (0,)] and scattered.tolist() == [10]


def narrow_gather():
    """The gradient of float32 parameters that are gathered in bfloat16."""
    grid = world()
    x = torch.full((2,), 1.0 + grid.rank)

    def loss(x):
        return (collectives.all_gather(x, grid.group(), dtype=torch.bfloat16) * (1 + 2.0**-6 * grid.rank)).sum()

    return grad(loss)(x), collectives.all_gather(x, grid.group(), dtype=torch.bfloat16)


def test_cotangents_of_a_narrow_gather_are_summed_in_the_dtype_of_the_shards(processes):
    for gradient, gathered in processes(4, narrow_gather):
        # bfloat16 has 8 bits: a sum in it would have lost the last.
        assert gradient.dtype == torch.float32 and gradient.tolist() == [4 + 6 * 2.0**-6] * 2
        assert gathered.dtype == torch.bfloat16 and gathered.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_of_one_process_each_is_the_identity():
    x, grid = torch.randn(2, 3), mesh.init()
    for collective in (collectives.all_gather, collectives.reduce_scatter, collectives.psum, collectives.broadcast):
        assert torch.equal(collective(x, grid.group("fsdp")), x)
    assert torch.equal(collectives.all_to_all(x, None, 0, 1), x)
    assert torch.equal(collectives.broadcast_from(x, None), x)


def refusals():
    group, x, messages = world().group(), torch.zeros(3, 4), []
    calls = {
        "dimension 0 of size 3 does not divide over 2 processes": lambda: collectives.reduce_scatter(x, group),
        "sizes (1, 1) do not divide dimension 0 of size 3": lambda: collectives.all_to_all(
            x, group, 0, 1, split_sizes=(1, 1)
        ),
        "which process": lambda: collectives.all_gather(x, group, sizes=(5, 5)),
        "bool tensors": lambda: collectives.psum(x > 0, group),
        "dimension 2 of a tensor of shape (3, 4)": lambda: collectives.all_gather(x, group, 2),
        "split and join are both dimension 1": lambda: collectives.all_to_all(x, group, 1, -1, split_sizes=(1, 3)),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        messages.append((message, str(error.value)))
    return messages


def test_what_does_not_fit_is_refused_before_anything_is_sent(processes):
    for messages in processes(2, refusals):
        for wanted, actual in messages:
            assert wanted in actual
