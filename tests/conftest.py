"""Eight CPU devices for mesh tests, f32 throughout, and no silent rank promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

import pathlib  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_text():
    """The development texts; not on users' machines."""
    if not (SHARED / "data" / "text").is_dir():
        pytest.skip("development texts (../shared/data/text) are not on this machine")
    return SHARED / "data" / "text"
