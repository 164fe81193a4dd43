"""The image record's shape, from a root file system small enough to read."""

import json

from post_training.images.build import BuiltImage
from post_training.images.push import image_record

IDENTITY = {
    "name": "cpu",
    "version": "1.2.3",
    "input_hash": "1" * 64,
    "base": "locked",
    "base_sha256": "4" * 64,
    "lock_sha256": {"requirements.lock": "5" * 64},
    "platform": "linux/amd64",
}
LABELS = {"org.opencontainers.image.title": "post-training/cpu"}
STATUS = """Package: base-files
Status: install ok installed
Version: 12.4+deb12u13
Description: Debian base system
 with a second: line

Package: libc6
Version: 2.36-9+deb12u14
"""


def test_image_record_is_the_golden_file(tmp_path, golden):
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(STATUS)
    info = tmp_path / "opt/post-training/venv/lib/python3.11/site-packages/six-1.17.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: six\nVersion: 1.17.0\n")
    image = BuiltImage("localhost/x:1", "sha256:" + "2" * 64, IDENTITY, LABELS, {"LANG": "C.UTF-8"})
    record = image_record(
        image,
        tmp_path,
        "3" * 64,
        4096,
        {"commit": "6" * 40, "dirty": False},
        {"buildah": "buildah version 1.28.2", "mksquashfs": "mksquashfs version 4.5.1"},
    )
    assert record.pop("pushed").endswith("+00:00")
    golden("image-record.json", json.dumps(record, indent=2) + "\n")
