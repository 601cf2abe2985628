"""Few rows on a CPU: our kernel's and XLA's products against numpy, and life without a compiler."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax.cpu import build, matmul

MOST = matmul.MOST_ROWS


def draw(*shape):
    return np.random.default_rng(shape[0]).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def kernel():
    if not any(map(shutil.which, ["c++", "g++", "clang++"])):
        pytest.skip("no C++ compiler on this machine")
    assert build.has("SkinnyMatmul")


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, MOST, MOST + 1])
@pytest.mark.parametrize("shape", [(7, 6), (1, 37), (390, 264)])
def test_it_is_a_product(rows, shape):
    """By the kernel and, with more rows, by XLA; threads share the largest matrix."""
    x, w = draw(rows, shape[1]), draw(*shape)
    expected = x.astype(np.float64) @ w.T.astype(np.float64)
    np.testing.assert_allclose(jax.jit(matmul.skinny_matmul)(x, w), expected, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
def test_rows_of_zeros_are_cut_off_again(count):
    """XLA's form, which machines without a compiler take."""
    x, wt = draw(count, 6), draw(7, 6)
    y = jax.jit(matmul.weights_first)(x, wt)
    assert y.shape == (count, 7)
    np.testing.assert_allclose(y, x @ wt.T, atol=1e-5)


def test_the_kernel_takes_few_rows_of_float32_and_no_others(kernel):
    def takes(rows, dtype=jnp.float32, out_dtype=None):
        x, wt = jax.ShapeDtypeStruct((rows, 6), dtype), jax.ShapeDtypeStruct((7, 6), dtype)
        run = jax.jit(lambda x, wt: matmul.skinny_matmul(x, wt, out_dtype))
        return build.target("SkinnyMatmul") in run.lower(x, wt).as_text()

    assert takes(1) and takes(MOST) and takes(2, out_dtype=jnp.float32)
    assert not takes(MOST + 1)
    assert not takes(2, jnp.bfloat16) and not takes(2, jnp.bfloat16, jnp.float32)


def test_a_row_does_not_depend_on_the_others(kernel):
    """To the bit, so a token is the same in any batch of 1 to 64; not even on NaN."""
    x, wt = draw(MOST, 1003), draw(503, 1003)
    run = jax.jit(matmul.skinny_matmul)
    alone = np.concatenate([run(x[i : i + 1], wt) for i in range(MOST)])
    for count in range(2, MOST + 1):
        np.testing.assert_array_equal(run(x[:count], wt), alone[:count])
    x[3] = np.nan
    together = np.asarray(run(x, wt))
    assert np.isnan(together[3]).all()
    np.testing.assert_array_equal(np.delete(together, 3, 0), np.delete(alone, 3, 0))


def joined(widths, ranks, num_loops, size):
    """Several projections as one `LoraMatrix`, random."""
    return matmul.LoraMatrix(
        w=draw(sum(widths), size),
        a=draw(num_loops * sum(ranks), size) if sum(ranks) else None,
        b=tuple(draw(width, num_loops * rank) for width, rank in zip(widths, ranks, strict=True)),
        delta=((),) * len(widths),
        bias=(None,) * len(widths),
        num_loops=num_loops,
    )


def reference(x, m, loop, asked):
    """Row by row and projection by projection, float64."""
    x, w, out, rank = x.astype(np.float64), np.asarray(m.w, np.float64), 0, 0
    ys = []
    for count, b in zip(asked, m.b, strict=True):
        mine = b.shape[1] // m.num_loops
        y = np.zeros((count, len(b)))
        for row, n in enumerate(loop[:count]):
            delta = b[:, n * mine : (n + 1) * mine] @ m.a[rank + n * mine :][:mine] if mine else 0
            y[row] = (w[out : out + len(b)] + delta) @ x[row]
        ys.append(y)
        out, rank = out + len(b), rank + b.shape[1]
    return ys


def run(x, m, loop, asked=()):
    """`matmul` on rows that the kernel takes."""
    assert matmul.kernel_takes(x, m.w, x.dtype)
    return [np.asarray(y) for y in jax.jit(matmul.matmul, static_argnums=3)(x, m, loop, asked)]


@pytest.mark.parametrize("count", [1, 2, 7, 12, 13, 16, 21, 30, 40])
@pytest.mark.parametrize("num_loops", [2, 3])
def test_each_row_has_the_lora_of_its_loop(kernel, count, num_loops):
    """Unlike ranks, zero among them; a projection for the first rows only; NaN stays alone."""
    rng = np.random.default_rng(count)
    m = joined((60, 33, 7), (5, 0, 16), num_loops, size=101)
    x, loop = draw(count, 101), rng.integers(0, num_loops, count)
    x[::4] = 0  # idle
    asked = (-(-count // 2), count, count)
    ours = run(x, m, loop, asked)
    for y, expected in zip(ours, reference(x, m, loop, asked), strict=True):
        np.testing.assert_allclose(y, expected, atol=2e-3)
    x[1 % count] = np.nan
    for y, healthy in zip(run(x, m, loop, asked), ours, strict=True):
        broken = np.arange(len(y)) == 1 % count
        assert np.isnan(y[broken]).all()
        np.testing.assert_array_equal(y[~broken], healthy[~broken])


@pytest.mark.parametrize("rows", [(8, 16, 8), (8, 8, 16), (16, 8, 8), (20, 4, 8), (32,), (3, 21)])
def test_loops_may_begin_and_end_in_any_vector(kernel, rows):
    """Eight rows are a vector, and four vectors of AVX-512 two pairs."""
    loop = np.repeat(np.arange(len(rows)), rows)
    x, m = draw(len(loop), 20), joined((13,), (5,), 3, size=20)
    (y,), (expected,) = run(x, m, loop), reference(x, m, loop, [len(x)])
    np.testing.assert_allclose(y, expected, atol=2e-3)


def test_projections_may_each_be_asked_for_other_rows(kernel):
    """The kernel takes rows 16 at a time, by loop: here rows 32 to 39 come before 16 to 31."""
    x, loop, asked = draw(40, 20), np.repeat([0, 1, 0], [16, 16, 8]), (16, 32, 40)
    m = joined((9, 7, 8), (2, 2, 2), 2, size=20)
    for y, expected in zip(run(x, m, loop, asked), reference(x, m, loop, asked), strict=True):
        np.testing.assert_allclose(y, expected, atol=2e-3)


def test_xla_computes_the_same_where_the_kernel_does_not(kernel):
    """More rows than the kernel takes."""
    rng = np.random.default_rng(0)
    asked = (MOST, MOST + 6)
    m, x = joined((9, 7), (2, 3), 2, size=20), draw(asked[1], 20)
    loop = rng.integers(0, 2, asked[1])
    assert not matmul.kernel_takes(x, m.w, x.dtype)
    ours = jax.jit(matmul.matmul, static_argnums=3)(x, m, loop, asked)
    for y, expected in zip(ours, reference(x, m, loop, asked), strict=True):
        np.testing.assert_allclose(y, expected, atol=2e-3)


def test_many_products_at_once(kernel):
    """Independent ones, whose helpers come late or never while the others' threads are busy."""
    x, wts = draw(2, 256), [draw(300 + i, 256) for i in range(40)]
    run = jax.jit(lambda x, wts: [matmul.skinny_matmul(x, wt) for wt in wts])
    for _ in range(20):
        for y, wt in zip(run(x, wts), wts, strict=True):
            np.testing.assert_allclose(y, x @ wt.T, atol=1e-4)


IDLE = """
import time
import numpy as np
import jax
from recursive_jax.cpu import matmul

x, w = np.zeros((3, 576), np.float32), np.ones((600, 576), np.float32)
a, b = np.ones((128, 576), np.float32), (np.ones((600, 128), np.float32),)
m = matmul.LoraMatrix(w=w, a=a, b=b, delta=((),), bias=(None,), num_loops=2)
run = jax.jit(matmul.matmul)
assert matmul.kernel_takes(x, w, x.dtype)
for _ in range(50):
    np.testing.assert_array_equal(run(x, m, np.zeros(3, np.int32))[0], 0)
end = time.monotonic() + 30
while True:  # whatever else has just ended may still clean up
    spent = time.process_time()
    time.sleep(0.2)
    spent = time.process_time() - spent
    if spent < 0.02 or time.monotonic() > end:
        break
print(spent)
"""


def test_no_helper_is_left_behind(kernel):
    """Also of products of zeros, which end at once: a helper that spins would run for ever."""
    done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.02, "processor seconds in 0.2 s of sleep"


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
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": ""}
    if compiler and compiler.startswith("#!"):
        script = tmp_path / "broken"
        script.write_text(compiler.replace("sh\n", f"sh\nPATH={os.environ['PATH']}\n"))
        script.chmod(0o755)
        compiler = str(script)
    if compiler:
        environment["CXX"] = compiler
    done = in_a_fresh_process(environment)
    assert (
        done.stderr.count("skinny_matmul.cc, decode_attention.cc, top1.cc are not used") == 1
        and said in done.stderr
    )


def test_an_unwritable_cache_is_no_end(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    done = in_a_fresh_process({"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert "are not used, and a CPU decodes more slowly" in done.stderr


@pytest.fixture(scope="module")
def first_build(tmp_path_factory, kernel):
    """A cache directory with a new library, and what the build said."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, in_a_fresh_process({"XDG_CACHE_HOME": str(cache)}).stderr


def test_the_first_build_says_so_and_the_second_does_not(first_build):
    cache, said = first_build
    assert said.count("building CPU kernels with") == 1 and str(cache / "recursive_jax") in said
    assert "building" not in in_a_fresh_process({"XDG_CACHE_HOME": str(cache)}).stderr


@pytest.mark.parametrize("damage", ["half", "flipped"])
def test_a_damaged_library_is_made_again(tmp_path, first_build, damage):
    """Half a library, mapped, would end the process with SIGBUS."""
    good = library_in(first_build[0])
    compiler = tmp_path / "compiler"  # it copies the library that is there, and takes no 20 seconds
    real = next(filter(None, map(shutil.which, build.COMPILERS)))
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-dM*) exec {real} "$@";; esac\n'
        f'while [ "$1" != -o ]; do shift; done\ncp {good} "$2"\n'
    )
    compiler.chmod(0o755)
    data = good.read_bytes()
    flipped = data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]
    library = tmp_path / "recursive_jax" / good.name
    library.parent.mkdir()
    library.write_bytes(data[: len(data) // 2] if damage == "half" else flipped)
    done = in_a_fresh_process({"XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)})
    assert done.stderr.count("building CPU kernels with") == 1
    assert library_in(tmp_path).read_bytes() == data


def library_in(cache):
    (library,) = (cache / "recursive_jax").glob("kernels-*.so")
    return library


def in_a_fresh_process(environment):
    """A product of two rows and of one, in a process of its own."""
    code = (
        "import numpy as np; from recursive_jax.cpu.matmul import skinny_matmul\n"
        "x, w = np.ones((2, 6), 'f'), np.ones((7, 6), 'f')\n"
        "assert (skinny_matmul(x, w) == 6).all() and (skinny_matmul(x[:1], w) == 6).all()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ) | environment,
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_moving_arrays_to_large_pages_keeps_their_numbers():
    """Whether this kernel has large pages or not."""
    numbers = np.random.default_rng(0).normal(size=(8 << 20,)).astype(np.float32)
    array, small = jnp.array(numbers), jnp.arange(3)
    build.use_huge_pages([array, small, numbers])
    np.testing.assert_array_equal(array, numbers)
    np.testing.assert_array_equal(small, [0, 1, 2])


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_every_page_of_large_arrays_is_moved(monkeypatch):
    advised = []

    class Advise:
        def __call__(self, address, length, advice):
            advised.append((address, length, advice))

    class C:
        madvise = Advise()

    array = jax.block_until_ready(jnp.zeros(8 << 20))
    monkeypatch.setattr(build.ctypes, "CDLL", lambda _: C)
    build.use_huge_pages([array, jnp.arange(3)])
    first = array.unsafe_buffer_pointer()
    pages = {address for address, _, _ in advised}
    assert {length for _, length, _ in advised} == {build.PAGE}
    assert min(pages) <= first and max(pages) + build.PAGE >= first + array.nbytes
    assert len(pages) in (16, 17)
