import pytest
import torch

from bench.timing import allocated_peak
from functional_sd3 import weights
from functional_sd3.core import prng, tree
from functional_sd3.core.transform import compiler_available
from functional_sd3.training import optim, step
from functional_sd3.transformer import mmdit


@pytest.fixture
def setting(tiny):
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    learned = step.trainable(tiny.spec)
    loss = step.flow_loss(tiny.config, dropout=0.5, empty=tiny.empty)
    return loss, optimizer, learned, step.init(prng.key(7), tiny.params, optimizer, trainable=learned)


def advance(setting, batch, steps=3, **options):
    loss, optimizer, learned, state = setting
    train_step = step.make_train_step(loss, optimizer, trainable=learned, **options)
    state = tree.map(torch.clone, state)
    for _ in range(steps):
        state, metrics = train_step(state, batch)
    return state, metrics


def test_a_step_changes_none_of_its_arguments_nor_the_global_generator(setting, tiny):
    loss, optimizer, learned, state = setting
    before, generator = tree.map(torch.clone, (state, tiny.batch)), torch.random.get_rng_state()
    step.make_train_step(loss, optimizer, trainable=learned)(state, tiny.batch)
    assert not tree.diff((state, tiny.batch), before)
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_a_step_is_a_function_of_state_and_batch(setting, tiny):
    (first, measured), (second, again) = advance(setting, tiny.batch), advance(setting, tiny.batch)
    assert not tree.diff(first, second) and not tree.diff(measured, again)


def test_steps_draw_with_keys_of_their_own(setting, tiny):
    loss, optimizer, learned, state = setting
    train_step = step.make_train_step(loss, optimizer, trainable=learned)
    _, first = train_step(state, tiny.batch)
    _, later = train_step(state._replace(step=state.step + 1), tiny.batch)
    assert not torch.equal(first["loss"], later["loss"])


def test_the_table_of_positions_is_not_learned_and_everything_else_is(setting, tiny):
    state, _ = advance(setting, tiny.batch, steps=1)
    before, after = (tree.flatten_paths(params) for params in (tiny.params, state.params))
    assert {path for path in before if torch.equal(before[path], after[path])} <= {
        "transformer.position",
        # Nothing reads these: unused rows and layers of the text encoders.
        *(path for path in before if path.startswith(("clip_l.final_norm", "clip_l.blocks.1", "clip_l.projection"))),
    }
    assert torch.equal(before["transformer.position"], after["transformer.position"])
    assert "transformer.position" not in "".join(tree.flatten_paths(state.optimizer))


def test_both_gradient_paths_are_equal(setting, tiny):
    (ours, measured), (theirs, expected) = (advance(setting, tiny.batch, gradient=g) for g in ("autograd", "func"))
    assert tree.allclose(ours.params, theirs.params, rtol=1e-5, atol=1e-5)
    assert tree.allclose(measured, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_taken_in_parts_gives_the_step_of_the_whole(setting, tiny, parts):
    (whole, measured), (summed, expected) = (advance(setting, tiny.batch, accumulate=n) for n in (1, parts))
    assert tree.allclose(whole.params, summed.params, rtol=1e-4, atol=1e-5)
    assert tree.allclose(measured, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"rows": 1}])
def test_three_parts_hold_two_trees_of_gradients(options):
    params = {str(index): torch.ones(128, 128) for index in range(64)}
    loss = lambda params, batch, keys: (sum((leaf * batch["x"].mean()).sum() for leaf in params.values()), {})  # noqa: E731
    optimizer = optim.adamw(1e-3)
    train_step = step.make_train_step(loss, optimizer, ema_decay=None, donate=True, **options)
    state = step.init(prng.key(0), params, optimizer, average=False)
    train_step(state, {"x": torch.ones(3, 4)})
    state = step.init(prng.key(0), params, optimizer, average=False)
    assert allocated_peak(lambda: train_step(state, {"x": torch.ones(3, 4)})) < 2.2 * tree.nbytes(params)


def test_a_batch_that_does_not_part_evenly_is_refused(setting, tiny):
    with pytest.raises(ValueError, match="batch of 4 cannot be accumulated in 3 equal parts"):
        advance(setting, tiny.batch, accumulate=3)


@pytest.mark.parametrize("donate", [True, "debug"])
def test_a_donated_step_equals_the_pure_one(setting, tiny, donate):
    (pure, _), (donated, _) = advance(setting, tiny.batch), advance(setting, tiny.batch, donate=donate)
    assert tree.allclose(pure.params, donated.params, rtol=1e-5, atol=1e-5)
    assert tree.allclose(pure.ema, donated.ema, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_without_an_average_keeps_none_and_is_the_same_otherwise(setting, tiny, donate):
    loss, optimizer, learned, state = setting
    alone = step.init(prng.key(0), tiny.params, optimizer, trainable=learned, average=False)
    assert alone.ema == {}
    without = (loss, optimizer, learned, alone._replace(key=state.key))
    (ours, measured), (expected, same) = (
        advance(setting, tiny.batch, donate=donate),
        advance(without, tiny.batch, donate=donate, ema_decay=None),
    )
    assert expected.ema == {} and not tree.diff(ours.params, expected.params) and not tree.diff(measured, same)


def test_a_donated_step_reuses_memory_and_never_the_callers(setting, tiny):
    loss, optimizer, learned, state = setting
    pointers = [leaf.data_ptr() for leaf in tree.leaves((state.params, state.ema))]
    callers = tree.map(torch.clone, tiny.params)
    after, _ = step.make_train_step(loss, optimizer, trainable=learned, donate=True)(state, tiny.batch)
    assert [leaf.data_ptr() for leaf in tree.leaves((after.params, after.ema))] == pointers
    assert not tree.diff(tiny.params, callers)


def test_a_donated_state_cannot_be_used_again_when_debugging(setting, tiny):
    loss, optimizer, learned, state = setting
    train_step = step.make_train_step(loss, optimizer, trainable=learned, donate="debug")
    train_step(state, tiny.batch)
    with pytest.raises((RuntimeError, ValueError)):
        train_step(state, tiny.batch)


def test_an_average_that_shares_the_parameters_memory_is_refused(setting, tiny):
    loss, optimizer, learned, state = setting
    with pytest.raises(ValueError, match="share memory"):
        step.make_train_step(loss, optimizer, trainable=learned, donate=True)(
            state._replace(ema=state.params), tiny.batch
        )


def test_the_metrics_say_loss_norm_and_rate(setting, tiny):
    state, metrics = advance(setting, tiny.batch, steps=2, rate=optim.warmup_constant(1.0, 10))
    assert float(metrics["rate"]) == pytest.approx(0.2)
    assert float(metrics["grad_norm"]) > 0 and int(state.step) == 2
    assert not any(leaf.requires_grad for leaf in tree.leaves((state, metrics)))


@pytest.mark.parametrize("options", [{"accumulate": 0}, {"gradient": "jax"}])
def test_unknown_ways_to_step_are_refused(setting, options):
    loss, optimizer, _, _ = setting
    with pytest.raises(ValueError, match=next(iter(options))):
        step.make_train_step(loss, optimizer, **options)


@pytest.fixture
def single():
    """A transformer alone, with its loss and a batch whose text is given as vectors."""
    sizes = mmdit.Config(
        depth=1, heads=2, head_dim=16, patch_size=1, context_width=8, pooled_width=8, position_size=2, sample_size=2
    )
    loss = step.flow_loss(weights.Config(transformer=sizes))
    batch = {
        "latents": prng.normal(prng.key(2), (4, 16, 2, 2)),
        "context": torch.zeros(4, 3, 8),
        "pooled": torch.eye(4, 8),
    }
    return loss, {"transformer": mmdit.init(prng.key(0), sizes)}, batch


def test_one_batch_is_learned_by_heart(single):
    loss, params, batch = single
    optimizer = optim.adamw(1e-2, b2=0.95)
    learned = lambda path, leaf: path != "transformer.position"  # noqa: E731
    train_step = step.make_train_step(loss, optimizer, trainable=learned, donate=True)
    state, losses = step.init(prng.key(0), params, optimizer, trainable=learned), []
    for _ in range(160):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert sum(losses[-20:]) / 20 < 0.5 * sum(losses[:10]) / 10


def test_a_compiled_step_equals_the_eager_one_at_batch_4():
    if not compiler_available():
        pytest.skip("compiling needs a C++ compiler and Python's headers")

    def loss(params, batch, keys):
        hidden = torch.tanh((batch["x"] + prng.normal(keys, (4,))) @ params["in"])
        return (hidden @ params["out"]).square().mean(), {"hidden": hidden.mean()}

    params = {"in": prng.normal(prng.key(0), (4, 8)), "out": prng.normal(prng.key(1), (8, 3)), "unused": torch.ones(2)}
    batch, optimizer = {"x": prng.normal(prng.key(2), (4, 4))}, optim.scale_by_learning_rate(0.1)
    state = step.init(prng.key(5), params, optimizer)
    eager, expected = step.make_train_step(loss, optimizer)(state, batch)
    compiled, measured = step.make_train_step(loss, optimizer, compile=True)(state, batch)
    assert not tree.allclose(eager.params, state.params, atol=1e-3)
    assert tree.allclose(compiled.params, eager.params, rtol=1e-4, atol=1e-5)
    assert tree.allclose(measured, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_flow_loss_is_one_graph_that_equals_eager(single):
    loss, params, batch = single
    keys = prng.split(prng.key(0), 4)
    gradient = torch.func.grad_and_value(loss, has_aux=True)
    # Traced and differentiated as for any backend, without the minutes that kernels take to build.
    traced = torch.compile(gradient, backend="aot_eager", fullgraph=True)(params, batch, keys)
    assert tree.allclose(traced, gradient(params, batch, keys), rtol=1e-4, atol=1e-5)


def test_a_choice_of_no_parameter_to_train_is_an_error():
    params = {"attention": {"weight": torch.ones(2)}, "mlp": {"weight": torch.ones(2)}}
    with pytest.raises(ValueError, match=r"trainable 'attn' chooses no parameter"):
        step.init(prng.key(0), params, optim.adamw(0.1), trainable="attn")
    with pytest.raises(ValueError, match=r"masked 'mlp' chooses no parameter; .*'\*mlp\*' chooses mlp.weight"):
        optim.masked(optim.adamw(0.1), "mlp").init(params)
    state = step.init(prng.key(0), params, optim.adamw(0.1), trainable="mlp.*")
    assert {path.rpartition("mlp.")[2] for path in tree.select(state.optimizer, "*mlp*")} == {"weight"}
