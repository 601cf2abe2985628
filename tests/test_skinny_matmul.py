"""Few rows on a CPU: our kernel's and XLA's products against numpy, and life without a compiler."""

import importlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax.cpu import build

# the function of the same name hides the module
module = importlib.import_module("recursive_jax.cpu.matmul")
MOST = module.MOST_ROWS


def draw(*shape):
    return np.random.default_rng(shape[0]).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def kernel():
    if not any(map(shutil.which, ["c++", "g++", "clang++"])):
        pytest.skip("no C++ compiler on this machine")
    assert build.has("SkinnyMatmul")


@pytest.mark.parametrize("lead", [(1,), (2,), (5,), (8,), (3, 3), (MOST,), (MOST + 1,)])
@pytest.mark.parametrize("shape", [(7, 6), (1, 37), (390, 264)])
def test_it_is_a_product(lead, shape):
    """Whoever multiplies; the largest matrix is one that threads share."""
    x, wt = draw(*lead, shape[1]), draw(*shape)
    expected = x.astype(np.float64) @ wt.T.astype(np.float64)
    np.testing.assert_allclose(jax.jit(module.few_rows)(x, wt), expected, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
def test_rows_of_zeros_are_cut_off_again(count):
    """XLA's form, which machines without a compiler take."""
    x, wt = draw(count, 6), draw(7, 6)
    y = jax.jit(module.by_xla)(x, wt)
    assert y.shape == (count, 7)
    np.testing.assert_allclose(y, x @ wt.T, atol=1e-5)


def test_the_kernel_takes_few_rows_of_float32_and_no_others(kernel):
    def takes(rows, dtype=jnp.float32, out_dtype=None):
        x, wt = jax.ShapeDtypeStruct((rows, 6), dtype), jax.ShapeDtypeStruct((7, 6), dtype)
        run = jax.jit(lambda x, wt: module.few_rows(x, wt, out_dtype))
        return build._target("SkinnyMatmul") in run.lower(x, wt).as_text()

    assert takes(1) and takes(MOST) and takes(2, out_dtype=jnp.float32)
    assert not takes(MOST + 1)
    assert not takes(2, jnp.bfloat16) and not takes(2, jnp.bfloat16, jnp.float32)


def test_a_row_does_not_depend_on_the_others(kernel):
    """To the bit, so a token is the same in any batch of 1 to 64; not even on NaN."""
    x, wt = draw(MOST, 1003), draw(503, 1003)
    run = jax.jit(module.few_rows)
    alone = np.concatenate([run(x[i : i + 1], wt) for i in range(MOST)])
    for count in range(2, MOST + 1):
        np.testing.assert_array_equal(run(x[:count], wt), alone[:count])
    x[3] = np.nan
    together = np.asarray(run(x, wt))
    assert np.isnan(together[3]).all()
    np.testing.assert_array_equal(np.delete(together, 3, 0), np.delete(alone, 3, 0))


def reference(x, wt, members, lora):
    """Row by row and projection by projection; None where nobody asks."""
    y, out, rank = np.full((len(x), len(wt)), np.nan), 0, 0
    x, wt = x.astype(np.float64), wt.astype(np.float64)
    for (width, asked), bt in zip(members, lora.bts, strict=True):
        mine = bt.shape[1] // lora.num_loops
        for row, loop in enumerate(lora.loop[:asked]):
            a = lora.at[rank + loop * mine :][:mine].T
            b = bt[:, loop * mine :][:, :mine].T
            y[row, out : out + width] = x[row] @ (wt[out : out + width].T + a @ b)
        out, rank = out + width, rank + bt.shape[1]
    return y


@pytest.mark.parametrize("count", [1, 2, 7, 12, 13, 16, 21, 30, 40])
@pytest.mark.parametrize("num_loops", [2, 3])
def test_each_row_has_the_lora_of_its_loop(kernel, count, num_loops):
    """Unlike ranks, zero among them; a projection asked of the first rows only; NaN stays alone."""
    rng = np.random.default_rng(count)
    widths, ranks, size = (60, 33, 7), (5, 0, 16), 101
    x, wt = draw(count, size), draw(sum(widths), size)
    x[::4] = 0  # idle
    loop = rng.integers(0, num_loops, count)
    bts = [draw(w, num_loops * r) for w, r in zip(widths, ranks, strict=True)]
    lora = module.Lora(loop, num_loops, draw(num_loops * sum(ranks), size), bts)
    members = list(zip(widths, (-(-count // 2), count, count), strict=True))

    @jax.jit
    def run(x, wt, loop, at, bts):
        return module.by_kernel(x, wt, members, module.Lora(loop, num_loops, at, bts))

    y = np.asarray(run(x, wt, loop, lora.at, lora.bts))
    expected = reference(x, wt, members, lora)
    there = ~np.isnan(expected)
    assert there.sum() == sum(width * asked for width, asked in members)
    np.testing.assert_allclose(y[there], expected[there], atol=2e-3)
    x[1 % count] = np.nan
    broken = np.asarray(run(x, wt, loop, lora.at, lora.bts))
    assert np.isnan(broken[1 % count][there[1 % count]]).all()
    others = np.arange(count) != 1 % count
    np.testing.assert_array_equal(broken[others][there[others]], y[others][there[others]])


@pytest.mark.parametrize("rows", [(8, 16, 8), (8, 8, 16), (16, 8, 8), (20, 4, 8), (32,), (3, 21)])
def test_loops_may_begin_and_end_in_any_vector(kernel, rows):
    """Eight rows are a vector, and four vectors of AVX-512 two pairs."""
    size, loop = 20, np.repeat(np.arange(len(rows)), rows)
    x, wt = draw(len(loop), size), draw(13, size)
    members, lora = [(13, len(x))], module.Lora(loop, 3, draw(15, size), [draw(13, 15)])
    run = jax.jit(
        lambda x, wt, at, bts: module.by_kernel(x, wt, members, lora._replace(at=at, bts=bts))
    )
    expected = reference(x, wt, members, lora)
    np.testing.assert_allclose(run(x, wt, lora.at, lora.bts), expected, atol=2e-3)


def test_projections_may_each_be_asked_of_other_rows(kernel):
    """Rows are taken 16 at a time, by loop: here rows 32 to 39 come before 16 to 31."""
    members, size = [(9, 16), (7, 32), (8, 40)], 20
    x, wt, loop = draw(40, size), draw(24, size), np.repeat([0, 1, 0], [16, 16, 8])
    lora = module.Lora(loop, 2, draw(12, size), [draw(width, 4) for width, _ in members])
    run = jax.jit(
        lambda x, wt, at, bts: module.by_kernel(x, wt, members, lora._replace(at=at, bts=bts))
    )
    expected = reference(x, wt, members, lora)
    there = ~np.isnan(expected)
    y = np.asarray(run(x, wt, lora.at, lora.bts))
    np.testing.assert_allclose(y[there], expected[there], atol=2e-3)


def test_many_products_at_once(kernel):
    """Independent ones, whose helpers come late or never while the others' threads are busy."""
    x, wts = draw(2, 256), [draw(300 + i, 256) for i in range(40)]
    run = jax.jit(lambda x, wts: [module.few_rows(x, wt) for wt in wts])
    for _ in range(20):
        for y, wt in zip(run(x, wts), wts, strict=True):
            np.testing.assert_allclose(y, x @ wt.T, atol=1e-4)


def test_no_helper_is_left_behind(kernel):
    """Also of products that end at once, since no lane is busy: one would spin for ever."""
    x, wt, loop = np.zeros((3, 576), np.float32), draw(600, 576), np.zeros(3, np.int32)
    lora = module.Lora(loop, 2, draw(2 * 64, 576), [draw(600, 2 * 64)])
    run = jax.jit(lambda x, wt, lora: module.by_kernel(x, wt, (), lora._replace(num_loops=2)))
    for _ in range(50):
        np.testing.assert_array_equal(run(x, wt, lora), 0)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (None, "no C++ compiler (looked for c++, g++, clang++; or set CXX)"),
        ("no-such-compiler", "no C++ compiler (looked for no-such-compiler; or set CXX)"),
        ("#!/bin/sh\necho it is broken >&2; exit 1", "it is broken"),
        ("#!/bin/sh\necho >&2; exit 1", "non-zero exit status"),
        ("#!/bin/sh\necho nonsense > $(echo $* | grep -o '[^ ]*\\.so'); exit 0", "too short"),
    ],
)
def test_without_a_compiler_it_warns_once_and_xla_multiplies(tmp_path, compiler, said):
    environment = dict(os.environ, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    environment.pop("CXX", None)
    if compiler and compiler.startswith("#!"):
        script = tmp_path / "broken"
        script.write_text(compiler.replace("sh\n", f"sh\nPATH={os.environ['PATH']}\n"))
        script.chmod(0o755)
        compiler = str(script)
    if compiler:
        environment["CXX"] = compiler
    code = (
        "import numpy as np; from recursive_jax.cpu.matmul import few_rows\n"
        "x, wt = np.ones((2, 6), 'f'), np.ones((7, 6), 'f')\n"
        "assert (few_rows(x, wt) == 6).all() and (few_rows(x[:1], wt) == 6).all()"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("skinny_matmul.cc, decode_attention.cc, top1.cc are not used") == 1
        and said in done.stderr
    )


def test_an_unwritable_cache_is_no_end(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    build._registered.cache_clear()
    try:
        y = jax.jit(lambda x, wt: module.few_rows(x, wt))(draw(2, 6), draw(7, 6))
        np.testing.assert_allclose(y, draw(2, 6) @ draw(7, 6).T, atol=1e-5)
        assert not build.has("SkinnyMatmul") and "skinny_matmul.cc" in caplog.text
    finally:
        build._registered.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_large_pages_hold_the_same_numbers():
    enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    version = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    if version < (6, 1) or not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this kernel gives none")

    def size(array):
        """Bytes of large pages in the mappings that hold it."""
        first, total = array.unsafe_buffer_pointer(), 0
        maps = re.split(r"\n(?=[0-9a-f]+-)", pathlib.Path("/proc/self/smaps").read_text())
        for one in maps:
            begin, end = (int(n, 16) for n in re.match(r"([0-9a-f]+)-([0-9a-f]+)", one).groups())
            if begin < first + array.nbytes and first < end:
                total += int(re.search(r"AnonHugePages:\s+(\d+)", one)[1]) << 10
        return total

    numbers = np.random.default_rng(0).normal(size=(8 << 20,)).astype(np.float32)
    array, small = jnp.array(numbers), jnp.arange(3)
    build.use_huge_pages([array, small, numbers])
    assert size(array) >= 24 << 20, "of 32 MiB, all but the ends"
    np.testing.assert_array_equal(array, numbers)
    np.testing.assert_array_equal(small, [0, 1, 2])
