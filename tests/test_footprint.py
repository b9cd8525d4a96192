"""What a forward pass of the whole backbone takes, measured in a process of its own."""

import json
import subprocess
import sys

PROGRAM = """
import json, resource, time
import numpy as np
import dat_ref

config = dat_ref.config("dat_tiny")
model = dat_ref.DAT(config, dat_ref.init_params(config, seed=0))
image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
started = time.perf_counter()
logits = model(image)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "shape": logits.shape, "finite": bool(np.isfinite(logits).all())}))
"""


def test_dat_tiny_at_224_takes_under_5_seconds_and_2_gib():
    """The whole process, parameters and imports included, stays under 2 GiB; the forward under 5 s."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["shape"] == [1, 1000]
    assert found["finite"]
    assert found["seconds"] < 5
    assert found["peak"] < 2 * 2**30
