"""The built cpu image, looked at from inside."""

import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.image


def run_python(inside, script: str, **variables: str):
    """Run `script` from a file inside the image, as programs that inspect their source need."""
    text = f"cat > program.py <<'EOF'\n{script}\nEOF\nexec python program.py"
    return inside("sh", "-c", text, **variables)


def test_image_identity_inside_is_the_pinned_one(inside):
    done = inside("cat", "/etc/post-training/image.json")
    said = json.loads(done.stdout)
    pinned = inside("printenv", "POST_TRAINING_IMAGE_INPUT_HASH").stdout.strip()
    assert said["input_hash"] == pinned
    assert set(said) == {
        "name",
        "version",
        "input_hash",
        "base",
        "base_sha256",
        "lock_sha256",
        "platform",
    }


def test_image_root_is_read_only_and_tmp_is_not(inside):
    done = inside("sh", "-c", "touch /etc/x; touch /opt/post-training/x; touch /tmp/x && echo tmp")
    assert done.stdout == "tmp\n"
    assert done.stderr.count("Read-only file system") == 2


def test_image_holds_nothing_of_the_build_machine(inside):
    """No pip settings, no leftovers of the build, and none of this machine's package index."""
    settings = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    places = re.findall(r"(?:https?|file)://[^\s']+", settings + str(dict(os.environ)))
    names = ["pip.conf", ".netrc", "direct_url.json"]
    left = " -o ".join(f"-xdev -name {name}" for name in names)
    done = inside(
        "sh", "-c", f"find / {left}; find /root /tmp /mnt /var/lib/apt/lists -xdev -type f"
    )
    found = set(done.stdout.split())
    # pip was installed from a wheel of the image's own Debian, and says where it was.
    of_pip = {path for path in found if re.search(r"/pip-[^/]+/direct_url\.json$", path)}
    for path in of_pip:
        assert json.loads(inside("cat", path).stdout)["url"].startswith(
            "file:///usr/share/python-wheels/pip-"
        )
    assert found - of_pip <= {
        "/root/.bashrc",
        "/root/.profile",
        "/var/lib/apt/lists/lock",
    }
    assert "PIP_" not in inside("cat", "/etc/environment").stdout
    for place in places:
        hits = inside("grep", "-rlF", place, "/etc", "/root", "/var", "/opt/post-training/bin")
        assert hits.stdout == ""


def test_image_wheel_metadata_has_no_readme(inside):
    script = "from importlib.metadata import metadata as m; print(m('post-training').get_payload())"
    assert inside("python", "-c", script).stdout.strip() == ""


def test_image_record_names_what_is_inside(inside, post_training):
    digest = inside("printenv", "POST_TRAINING_IMAGE_OCI_DIGEST").stdout.strip()
    record = json.loads(post_training("image", "show", digest).stdout)
    assert record["oci_digest"] == digest
    listing = inside("python", "-c", "import torch, trl; print(torch.__version__, trl.__version__)")
    packages = record["packages"]["python"]
    assert listing.stdout.split() == [packages["torch"], packages["trl"]]
    assert packages["torch"] == "2.13.0+cpu"
    assert record["packages"]["debian"]["python3"].startswith("3.11")


def test_deepspeed_operators_load_without_a_compiler(inside):
    """Those of every start on CPU and of optimizer offload; and for CPUs without AVX-512 too."""
    script = """
import subprocess, torch
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder
ShareMemCommBuilder().load()
listing = subprocess.check_output(["objdump", "-d", CPUAdamBuilder().load().__file__], text=True)
print("%ymm" in listing, "%zmm" in listing)
"""
    done = run_python(inside, script, CXX="/bin/false", TORCH_EXTENSIONS_DIR="/nowhere")
    assert done.stdout == "True False\n", done.stderr[-2000:]


def test_deepspeed_adam_resumed_equals_uninterrupted_and_the_formula(inside):
    """The offloaded optimizer, stopped twice in 40 steps; AdamW's formula in float64."""
    script = """
import copy, torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
rate, beta1, beta2, epsilon, decay = 1e-2, 0.9, 0.999, 1e-8, 0.1
def adam(weight, state=None):
    weight = weight.clone().requires_grad_()
    optimizer = DeepSpeedCPUAdam([weight], lr=rate, betas=(beta1, beta2), eps=epsilon,
                                 weight_decay=decay, adamw_mode=True)
    if state is not None:
        optimizer.load_state_dict(state)
    return weight, optimizer
generator = torch.Generator().manual_seed(0)
start = torch.randn(1000, generator=generator)
weight, optimizer = adam(start)
again, resumed = adam(start)
exact, first, second = start.double(), torch.zeros(1000).double(), torch.zeros(1000).double()
equal = True
for step in range(1, 41):
    gradient = torch.randn(1000, generator=generator)
    for tensor, one in ((weight, optimizer), (again, resumed)):
        tensor.grad = gradient.clone()
        one.step()
    equal = equal and torch.equal(weight, again)
    if step in (2, 11):  # the powers of 0.9 and 0.999 round otherwise than products
        again, resumed = adam(again.detach(), copy.deepcopy(resumed.state_dict()))
    first = beta1 * first + (1 - beta1) * gradient.double()
    second = beta2 * second + (1 - beta2) * gradient.double() ** 2
    update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + epsilon)
    exact = exact * (1 - rate * decay) - rate * update
print(equal, (weight.double() - exact).abs().max().item() < 1e-5)
"""
    done = run_python(inside, script)
    assert done.stdout == "True True\n", done.stderr[-2000:]


def test_torch_compile_works_inside(inside):
    script = """
import torch
compiled = torch.compile(lambda x: torch.sin(x) * 2 + x, fullgraph=True)
x = torch.linspace(-1, 1, 100)
print(torch.allclose(compiled(x), torch.sin(x) * 2 + x))
"""
    done = run_python(inside, script)
    assert done.stdout == "True\n", done.stderr[-2000:]
