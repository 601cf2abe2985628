"""One optimiser step against slow references that share no code with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from recursive_jax.models import flops, layers
from recursive_jax.models.config import DecoderConfig
from recursive_jax.models.decoder import REMAT_CHOICES, Decoder
from recursive_jax.models.parameters import abstract_params, head_params
from recursive_jax.training.data import Batch
from recursive_jax.training.losses import Objective
from recursive_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from recursive_jax.training.setup import TrainSetup

TEACHER = DecoderConfig(
    "llama", 41, 16, 24, num_heads=4, num_kv_heads=2, head_dim=4, num_layers=6, tied_head=False
)
STUDENT = TEACHER.replace(
    num_layers=2, num_loops=3, norms="per_loop", lora_ranks={"q": 3, "v": 2, "down": 4}
)
BATCH, LENGTH = 4, 12
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def make_params(cfg):
    """Random params without zeros and ones, so that LoRAs and norms have an effect."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        normal = 0.2 * rng.standard_normal(leaf.shape)
        return normal.astype(np.float32) + (path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


@functools.cache
def make_batch(seed=0, batch=BATCH):
    """Rows of two packed documents and padding; the last position of a document is not scored."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 41, (batch, LENGTH)).astype(np.int32)
    cut = 5
    segments = np.where(np.arange(LENGTH) < cut, 1, 2) * np.ones((batch, 1), int)
    segments[-1, -3:] = 0
    positions = np.where(np.arange(LENGTH) < cut, np.arange(LENGTH), np.arange(LENGTH) - cut)
    weights = ((segments > 0) & (np.roll(segments, -1, 1) == segments)).astype(np.float32)
    weights[:, -1] = 0
    return Batch(
        tokens=tokens,
        targets=np.where(weights > 0, np.roll(tokens, -1, 1), 0).astype(np.int32),
        weights=weights,
        positions=np.broadcast_to(positions, tokens.shape).astype(np.int32),
        segment_ids=segments.astype(np.int32),
    )


@functools.cache
def all_logits(cfg):
    """f64 `[L, B, T, V]` of the batch, whole, by the decoder alone."""
    model, batch = Decoder(cfg), make_batch()

    @quick
    def run(params):
        hidden = model.apply(
            {"params": params}, batch.tokens, batch.positions, batch.segment_ids, all_loops=True
        )
        head = {"params": head_params(params)}
        return [model.apply(head, x, method="unembed") for x in hidden]

    return np.asarray(run(make_params(cfg)), np.float64)


def mean_of(setup):
    """`(params, batch, teacher_params) -> (mean loss per scored token, metrics)`."""

    def loss(params, batch, teacher_params):
        metrics = setup.metrics(setup.loss_sum(params, batch, teacher_params)[1])
        return metrics["loss"], metrics

    return loss


def mean_loss(objective, logits, teacher, batch):
    """The objective over the scored tokens, in float64, token by token."""
    total, count, agreed = 0.0, 0, 0
    for b, t in zip(*np.nonzero(batch.weights), strict=True):
        log_q = scipy.special.log_softmax(logits[:, b, t], axis=-1)
        count += 1
        agreed += logits[-1, b, t].argmax() == batch.targets[b, t]
        exits = len(logits)
        alpha = [objective.exit_coefficient] * (exits - 1) + [1.0]
        if objective.exit_loss == "weighted":
            alpha = np.arange(1, exits + 1) / np.arange(1, exits + 1).sum()
        total -= alpha[-1] * objective.ce * log_q[-1, batch.targets[b, t]]
        if objective.kd:
            log_p = scipy.special.log_softmax(teacher[b, t])
            total += alpha[-1] * objective.kd * np.sum(np.exp(log_p) * (log_p - log_q[-1]))
        for weight, earlier in zip(alpha, log_q[:-1], strict=False):
            exit_loss = -earlier[batch.targets[b, t]]
            exit_loss += objective.exit_kd * np.sum(np.exp(log_q[-1]) * (log_q[-1] - earlier))
            total += weight * exit_loss
    return total / count, agreed / count, count


@pytest.mark.parametrize(
    "objective",
    [
        Objective(kd=0.0),
        Objective(ce=0.5, kd=2.0),
        Objective(kd=0.0, exit_coefficient=0.1),
        Objective(kd=1.0, exit_coefficient=0.3, exit_kd=0.5),
        Objective(kd=1.0, exit_loss="weighted", exit_kd=0.5),
    ],
    ids=["ce", "kd", "exits", "all", "weighted"],
)
def test_loss_and_metrics_by_a_slow_reference(objective):
    """Final coefficient 1 and earlier ones c, or α_i = i / Σj (paper §3.7); means over tokens."""
    params, teacher_params, batch = make_params(STUDENT), make_params(TEACHER), make_batch()
    teacher = Decoder(TEACHER) if objective.kd else None
    # room for five positions' logits: twelve are three uneven chunks
    copies = (3 if objective.exits else 1) + (teacher is not None)
    options = dict(logits_bytes=4 * BATCH * 5 * STUDENT.vocab_size * copies)
    setup = TrainSetup(Decoder(STUDENT), None, objective, teacher, **options)
    loss, metrics = quick(mean_of(setup))(params, batch, teacher_params)
    logits = all_logits(STUDENT)
    expected, accuracy, count = mean_loss(objective, logits, all_logits(TEACHER)[-1], batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], loss)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert metrics["tokens"] == count == batch.weights.sum()
    names = {"loss", "tokens", "ce", "accuracy"}
    names |= {"kd"} if objective.kd else set()
    if objective.exits:
        names |= {f"{n}_exit_{i}" for n in ("ce", "accuracy") for i in (1, 2)}
        first = mean_loss(Objective(kd=0.0), logits[:1], None, batch)
        np.testing.assert_allclose(metrics["ce_exit_1"], first[0], rtol=1e-4)
        np.testing.assert_allclose(metrics["accuracy_exit_1"], first[1], rtol=1e-6)
    names |= {"exit_kd"} if objective.exit_kd else set()
    assert set(metrics) == names


def test_distillation_leaves_the_teacher_alone_and_vanishes_for_equals():
    objective = Objective(ce=0.0, kd=1.0)
    params, batch = make_params(TEACHER), make_batch()
    loss = mean_of(TrainSetup(Decoder(TEACHER), None, objective, Decoder(TEACHER)))
    value, to_teacher = quick(jax.value_and_grad(lambda p, t: loss(p, batch, t)[0], argnums=1))(
        params, params
    )
    assert abs(value) < 1e-6
    assert not any(np.any(g) for g in jax.tree.leaves(to_teacher))


def test_a_batch_without_a_scored_token_changes_nothing():
    batch = make_batch()
    batch = batch.replace(weights=np.zeros_like(batch.weights))
    loss = mean_of(TrainSetup(Decoder(STUDENT), None, Objective(kd=0.0)))
    (value, _), gradients = quick(jax.value_and_grad(loss, has_aux=True))(
        make_params(STUDENT), batch, None
    )
    assert value == 0.0
    assert not any(np.any(g) for g in jax.tree.leaves(gradients))


def student_gradients(**options):
    """Value and gradients of cross-entropy."""
    loss = mean_of(TrainSetup(Decoder(STUDENT, **options), None, Objective(kd=0.0)))
    return quick(jax.value_and_grad(loss, has_aux=True))(make_params(STUDENT), make_batch(), None)


@functools.cache
def plain_gradients():
    return student_gradients()


def assert_same_gradients(got, atol):
    (value, _), gradients = got
    (expected_value, _), expected = plain_gradients()
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        want = functools.reduce(lambda tree, key: tree[key.key], path, expected)
        assert np.abs(want).max() > 1e-5, f"{path}: no gradient to compare"
        np.testing.assert_allclose(g, want, atol=atol, err_msg=str(path))


@pytest.mark.parametrize("policy", [p for p in REMAT_CHOICES if p != "none"])
def test_remat_changes_memory_not_gradients(policy):
    assert_same_gradients(student_gradients(remat_policy=policy), atol=1e-5)


def test_bf16_computes_coarsely_and_keeps_float32_where_it_counts():
    """Params, gradients and loss stay f32; products are bf16, 8 bits: about 1 % of a gradient."""
    params, teacher_params, batch = make_params(STUDENT), make_params(TEACHER), make_batch()
    objective = Objective(kd=1.0, exit_coefficient=0.1)

    def run(dtype):
        loss = mean_of(
            TrainSetup(Decoder(STUDENT, dtype), None, objective, Decoder(TEACHER, dtype))
        )
        (value, _), grads = quick(jax.value_and_grad(loss, has_aux=True))(
            params, batch, teacher_params
        )
        return value, jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

    (fine, fine_grads), (coarse, coarse_grads) = run(jnp.float32), run(jnp.bfloat16)
    assert coarse.dtype == coarse_grads.dtype == jnp.float32
    assert 0 < abs(coarse - fine) < 1e-2 * fine
    error = jnp.linalg.norm(coarse_grads - fine_grads) / jnp.linalg.norm(fine_grads)
    assert 1e-4 < error < 3e-2


def test_kept_products_are_not_the_size_of_a_weight_per_loop():
    """Under 'dots' a merged LoRA is made again: kept, it would be as large as the untied model."""
    cfg = STUDENT.replace(mlp_dim=32)
    params = make_params(cfg)
    loss = mean_of(TrainSetup(Decoder(cfg, remat_policy="dots"), None, Objective(kd=0.0)))
    kept = jax.eval_shape(
        lambda p: jax.tree.leaves(jax.vjp(lambda q: loss(q, make_batch(), None)[0], p)[1]), params
    )
    weight = cfg.projections["down"]
    shapes = [leaf.shape for leaf in kept]
    # stacked by loop and layer, a product that was kept has both axes in front
    assert (cfg.num_loops, cfg.num_layers, *weight) not in shapes
    assert any(len(s) > 2 and s[:2] == (cfg.num_loops, cfg.num_layers) for s in shapes)


def test_unrolled_layers_change_no_gradient():
    assert_same_gradients(student_gradients(unroll_layers=2), atol=1e-5)


@pytest.mark.parametrize("form", ["merged", "per_token"])
def test_lora_forms_have_equal_gradients_in_the_model(form, monkeypatch):
    """Both forms are forced on every projection; the gradient of a merged one goes through w."""
    asked = []
    monkeypatch.setattr(layers, "lora_form", lambda *args: asked.append(args) or form)
    assert_same_gradients(student_gradients(), atol=1e-5)
    assert asked


def test_lora_form_goes_by_shape():
    """Merging costs 2·in·out·R, applying 2·tokens·R·(in + out)."""
    assert layers.lora_form(0, 100, 64, 64) == "merged"
    assert layers.lora_form(0, 32, 64, 64) == "per_token"
    assert layers.lora_form(1, 10_000, 64, 64) == "rows"


def test_lora_forms_agree():
    """Check 25: merged, per token and rows at mixed loops against numpy, gradients included."""
    loops, lanes, length, in_dim, out_dim, rank = 3, 5, 2, 7, 9, 4
    rng = np.random.default_rng(0)
    shapes = [(lanes, length, in_dim), (in_dim, out_dim)]
    shapes += [(loops, in_dim, rank), (loops, rank, out_dim)]
    x, w, a, b = arrays = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    loop = np.asarray([2, 0, 1, 1, 2], np.int32)
    weight = w + np.einsum("LIR,LRO->LIO", a, b)  # [loop, in, out]
    direction = rng.standard_normal((lanes, length, out_dim)).astype(np.float32)
    expected = np.einsum("BTI,BIO->BTO", x, weight[loop])
    # by hand: d/dx, d/dw, d/da, d/db of <direction, y>
    outer = np.einsum("BTI,BTO->BIO", x, direction)
    by_loop = np.stack([outer[loop == n].sum(0) for n in range(loops)])
    gradients = [
        np.einsum("BTO,BIO->BTI", direction, weight[loop]),
        outer.sum(0),
        np.einsum("LIO,LRO->LIR", by_loop, b),
        np.einsum("LIR,LIO->LRO", a, by_loop),
    ]

    def apply(form, x, w, a, b):
        if form == "rows":
            rows, loops = x.reshape(-1, in_dim), jnp.repeat(jnp.asarray(loop), length)
            y = layers.apply_lora(rows, w, a, b, loops, form, jnp.float32)
            return y.reshape(*x.shape[:-1], -1)
        lanes = [  # the other forms take one loop at a time
            layers.apply_lora(x[i : i + 1], w, a, b, int(n), form, jnp.float32)
            for i, n in enumerate(loop)
        ]
        return jnp.concatenate(lanes)

    @functools.partial(quick, static_argnums=0)
    def value_and_grad(form, arrays):
        y, pull = jax.vjp(functools.partial(apply, form), *arrays)
        return y, pull(jnp.asarray(direction))

    for form in ("merged", "per_token", "rows"):
        y, got = value_and_grad(form, arrays)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5, err_msg=form)
        for g, want in zip(got, gradients, strict=True):
            np.testing.assert_allclose(g, want, rtol=1e-5, atol=2e-5, err_msg=form)


# The step and its optimiser


@pytest.mark.parametrize(
    "decay, decayed",
    [
        ({}, ("w", "head")),
        ({"decay_on": "matrices"}, ("w", "head", "lora_a", "lora_b", "embedding")),
    ],
)
def test_updates_are_adamw_by_hand(decay, decayed):
    """Three steps in numpy float64: clipping, warm-up, bias correction, weight decay."""
    cfg = OptimizerConfig(
        **dict(learning_rate=1e-2, warmup_steps=2, clip_norm=0.5, weight_decay=0.1),
        **dict(lora_lr_scale=0.5),
        **decay,
    )
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def draw_params():
        up = {"w": draw(2, 3, 4), "b": draw(2, 4), "lora_a": draw(2, 2, 3, 1)}
        up["lora_b"] = draw(2, 2, 1, 4)
        block = {"mlp": {"up": up}, "pre_mlp_norm": {"scale": draw(2, 2, 3), "bias": draw(2, 3)}}
        return {"embedding": draw(5, 3), "head": draw(3, 5), "block": block}

    tx = make_optimizer(cfg, num_steps=10)
    got = draw_params()
    state = tx.init(got)
    size = sum(x.size for x in jax.tree.leaves(got))
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * size, "two moments"
    want = jax.tree.map(np.float64, got)
    m = v = jax.tree.map(np.zeros_like, want)
    update = quick(tx.update)
    for n, rate in enumerate([0.0, 0.5e-2, 1e-2]):  # linear from 0 to the peak in two steps
        grads = draw_params()
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
        assert norm > cfg.clip_norm, "clipping is at work"
        clipped = jax.tree.map(lambda g, k=cfg.clip_norm / norm: np.float64(g) * k, grads)
        m = jax.tree.map(lambda m, g: cfg.b1 * m + (1 - cfg.b1) * g, m, clipped)
        v = jax.tree.map(lambda v, g: cfg.b2 * v + (1 - cfg.b2) * g * g, v, clipped)

        def step(path, p, m, v, n=n, rate=rate):
            name = path[-1].key
            change = m / (1 - cfg.b1 ** (n + 1))
            change = change / (np.sqrt(v / (1 - cfg.b2 ** (n + 1))) + cfg.eps)
            change = change + (cfg.weight_decay * p if name in decayed else 0.0)
            return p - rate * change * (0.5 if name.startswith("lora_") else 1.0)

        want = jax.tree_util.tree_map_with_path(step, want, m, v)
        changes, state = update(grads, state, got)
        got = optax.apply_updates(got, changes)
    for path, x in jax.tree_util.tree_leaves_with_path(got):
        expected = functools.reduce(lambda tree, key: tree[key.key], path, want)
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6, err_msg=str(path))


def uneven_batch():
    """Eight rows, of which the second half has far fewer scored tokens."""
    parts = make_batch(0), make_batch(1)
    sparse = parts[1].replace(weights=parts[1].weights * (np.arange(LENGTH) < 2))
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), parts[0], sparse)


@pytest.mark.parametrize(
    "parts, exits", [(2, {"exit_coefficient": 0.3}), (4, {"exit_loss": "weighted"})]
)
def test_accumulated_micro_batches_are_the_large_batch(parts, exits):
    """Of different counts of scored tokens: a mean of means would weigh them wrongly."""
    objective = Objective(kd=1.0, exit_kd=0.5, **exits)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), num_steps=9)
    results = []
    for accumulate in (1, parts):
        setup = TrainSetup(Decoder(STUDENT), tx, objective, Decoder(TEACHER), accumulate=accumulate)
        state = setup.init(jax.tree.map(jnp.array, make_params(STUDENT)))
        grads, sums = quick(setup.gradient_sum)(state.params, uneven_batch(), make_params(TEACHER))
        _, stepped = quick(setup.step)(state, uneven_batch(), make_params(TEACHER))
        results.append((grads, setup.metrics(sums), stepped))
    (grads, metrics, stepped), (grads_parts, metrics_parts, stepped_parts) = results
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_parts[name], value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(stepped_parts["grad_norm"], stepped["grad_norm"], rtol=1e-6)
    whole, by_parts = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (grads, grads_parts)
    )
    assert np.linalg.norm(by_parts - whole) < 1e-6 * np.linalg.norm(whole)


def test_averaged_weights_follow_the_params():
    """`ema ← d·ema + (1 - d)·params` after every step, in float64."""
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), num_steps=9)
    setup = TrainSetup(Decoder(TEACHER), tx, Objective(kd=0.0), ema_decay=0.75)
    start = make_params(TEACHER)
    state, step = setup.init(jax.tree.map(jnp.array, start)), quick(setup.step)
    want = jax.tree.map(np.float64, start)
    for _ in range(3):
        state, _ = step(state, make_batch())
        want = jax.tree.map(lambda w, p: 0.75 * w + 0.25 * np.float64(p), want, state.params)
    assert state.weights is state.ema
    for got, expected, began in zip(*map(jax.tree.leaves, (state.ema, want, start)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
        assert np.abs(expected - began).max() > 1e-4


def test_padding_of_the_vocabularies_is_not_distilled():
    """Teacher and student of one tokenizer with 38 ids, padded to 41 and 47 rows."""
    objective, batch = Objective(ce=0.0, kd=1.0), make_batch()
    batch = batch.replace(tokens=batch.tokens % 38, targets=batch.targets % 38)
    padded = TEACHER.replace(vocab_size=47)
    teacher_params = dict(make_params(TEACHER))
    for name, ids in (("embedding", np.s_[:38]), ("head", np.s_[:, :38])):
        teacher_params[name] = make_params(padded)[name].copy()
        teacher_params[name][ids] = make_params(TEACHER)[name][ids]
    setup = TrainSetup(Decoder(TEACHER), None, objective, Decoder(padded), num_ids=38)
    loss, _ = quick(mean_of(setup))(make_params(TEACHER), batch, teacher_params)
    assert abs(loss) < 1e-6, "equal but for the padding"
    whole = TrainSetup(Decoder(TEACHER), None, objective, Decoder(TEACHER))
    student = jax.tree.map(lambda x: 1.1 * x, make_params(TEACHER))
    cut = TrainSetup(Decoder(TEACHER), None, objective, Decoder(padded), num_ids=38)
    assert quick(mean_of(cut))(student, batch, teacher_params)[0] > 1e-4
    assert quick(mean_of(whole))(student, batch, make_params(TEACHER))[0] > 1e-4


def test_learning_rate_schedule():
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1)
    rate = learning_rate_schedule(cfg, num_steps=24)
    np.testing.assert_allclose([rate(n) for n in range(5)], [0, 0.25, 0.5, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(rate(14), 0.55, rtol=1e-6)  # half of the cosine
    np.testing.assert_allclose([rate(24), rate(99)], 0.1, rtol=1e-6)
    assert learning_rate_schedule(cfg, num_steps=1)(0) == 1.0, "a single step is not a warm-up"


def test_a_recursive_model_learns():
    """Twenty steps on one batch: it comes nearer to the teacher, its exits to the text."""
    teacher, objective = Decoder(TEACHER), Objective(ce=0.0, exit_coefficient=0.1)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=3), num_steps=20)
    setup = TrainSetup(Decoder(STUDENT), tx, objective, teacher)
    step = quick(setup.step, donate_argnums=0)
    state, history = setup.init(jax.tree.map(jnp.array, make_params(STUDENT))), []
    for _ in range(20):
        state, metrics = step(state, make_batch(), make_params(TEACHER))
        history.append(jax.device_get(metrics))
    for name in ("loss", "kd", "ce_exit_1", "ce_exit_2"):
        assert history[-1][name] < 0.9 * history[0][name], name
    assert state.step == 20 and step._cache_size() == 1
    assert all(m["grad_norm"] > 0 and m["tokens"] == history[0]["tokens"] for m in history)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TrainSetup(Decoder(STUDENT), None, Objective(kd=1.0)),
            "distillation needs a teacher",
        ),
        (
            lambda: TrainSetup(Decoder(STUDENT), None, Objective(kd=0.0), Decoder(TEACHER)),
            "a teacher needs objective.kd > 0",
        ),
        (
            lambda: TrainSetup(
                Decoder(STUDENT), None, Objective(), Decoder(TEACHER.replace(vocab_size=40))
            ),
            "teacher vocabulary 40 differs from the student's 41",
        ),
        (lambda: OptimizerConfig(learning_rate=0.0), "optimizer.learning_rate must be > 0"),
        (lambda: OptimizerConfig(warmup_steps=-1), "optimizer.warmup_steps must be >= 0"),
    ],
)
def test_impossible_requests(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@functools.cache
def stepper():
    """A compiled step of the student, without clipping, and its state before the first."""
    cfg = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip_norm=0)
    objective = Objective(kd=0.0, exit_coefficient=0.1)
    tx = make_optimizer(cfg, num_steps=9)
    setup = TrainSetup(Decoder(STUDENT), tx, objective, accumulate=2, ema_decay=0.9)
    return quick(setup.step), setup.init(jax.tree.map(jnp.array, make_params(STUDENT)))


def with_weights(batch, *values):
    """A batch whose first scored tokens have these weights."""
    weights = batch.weights.copy()
    weights[tuple(np.argwhere(weights)[: len(values)].T)] = values
    return batch.replace(weights=weights)


@pytest.mark.parametrize(
    ("weights", "loss", "where"),
    [
        ([np.inf], "inf", ["shared", "lora_loop_3", "norms", "embedding"]),
        # The loss is large; the gradient's square is above the range of float32.
        ([1e25, -1e25], "finite", ["shared", "embedding"]),
    ],
    ids=["loss", "gradient"],
)
def test_a_step_that_is_not_finite_changes_nothing(weights, loss, where):
    step, state = stepper()
    state, metrics = step(state, make_batch(1))
    assert metrics["skipped"] == 0
    after, metrics = step(state, with_weights(make_batch(2), *weights))
    assert metrics["skipped"] == 1 and after.step == state.step + 1
    assert np.isfinite(metrics["loss"]) == (loss == "finite")
    assert not any(np.isfinite(metrics[f"grad_norm_{group}"]) for group in where)
    trees_equal(after.saved(), state.saved())
    # The next step equals that of a run that never saw the bad batch.
    skipped, clean = step(after, make_batch(3))[0], step(state, make_batch(3))[0]
    trees_equal(skipped.saved(), clean.saved())


def test_gradient_norms_by_group():
    step, state = stepper()
    after, metrics = step(state, make_batch(1))
    moment = after.opt_state[0].mu  # 1 - b1 of the gradient
    squares = {}
    for path, g in jax.tree_util.tree_leaves_with_path(moment):
        name, g = jax.tree_util.keystr(path), np.asarray(g, np.float64) / (1 - 0.9)
        if "lora" in name:  # [layer, loop, ...]
            groups = {f"lora_loop_{i + 1}": g[:, i] for i in range(3)}
        elif name.endswith("['w']"):
            groups = {"shared": g}
        else:
            groups = {"embedding" if name in ("['embedding']", "['head']") else "norms": g}
        for group, part in groups.items():
            squares[group] = squares.get(group, 0) + (part**2).sum()
    prefix = "grad_norm_"
    got = {k.removeprefix(prefix): x for k, x in metrics.items() if k.startswith(prefix)}
    assert set(got) == set(squares) and len(got) == 6
    for group, square in squares.items():
        np.testing.assert_allclose(got[group], square**0.5, rtol=1e-5, err_msg=group)
    np.testing.assert_allclose(metrics["grad_norm"], sum(squares.values()) ** 0.5, rtol=1e-5)


def test_model_operations_of_a_step():
    """Against products counted one by one, and in the compiled text of a step for 16 TPU chips."""
    length, context = 10, 5.5
    attention = 4 * 4 * 4 * context  # scores and sums of 4 heads of 4
    block = 2 * (2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) + attention)
    lora = 2 * 2 * (3 * (16 + 16) + 2 * (16 + 8) + 4 * (24 + 16))
    head = 2 * 16 * 41
    got = flops.training_flops(STUDENT, length)
    assert got == 3 * (3 * (block + lora) + head)
    assert flops.training_flops(STUDENT, length, loops=2, exits=True, teacher=TEACHER) == (
        3 * (2 * (block + lora) + 2 * head) + 3 * block + head
    )
    gemma = DecoderConfig(
        "gemma", 256_000, 2048, 16_384, num_heads=8, num_kv_heads=1, head_dim=256, num_layers=18,
        tied_head=True,
    )  # fmt: skip
    ranks = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 64)
    student = gemma.replace(num_layers=9, num_loops=2, lora_ranks=ranks)
    counted = 32.65e12 + 10.88e12  # student and teacher, 2,048 tokens, attention unmasked
    whole = 2048 * flops.training_flops(student, 2048, teacher=gemma)
    assert whole == pytest.approx(counted, rel=0.01)
