"""A finished run as an in-toto statement with SLSA's provenance: what was made, of what, by what.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
https://slsa.dev/spec/v1.0/provenance

It is not signed here: `cosign attest-blob --statement` and the like do that for its owner.
"""

from collections.abc import Collection, Mapping
from typing import Any

STATEMENT_NAME = "provenance.intoto.json"
_BUILD_TYPE = "urn:post-training:stage-run:1"


def statement(
    record: dict[str, Any], *, gone: Collection[str] = (), packed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Its subjects are the files that the run made, by their sha256.

    gone: of these, what is not there any more, and so is not stated. packed: sha256 of the files
    that the statement goes with, such as the record that it is made from.
    """
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": name, "digest": {"sha256": digest}}
            for name, digest in sorted(record["outputs"]["files"].items())
            if name not in gone
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {"stage": record["stage"], "recipe": record["recipe"]},
                "internalParameters": {
                    "topology": record["topology"],
                    "environment": record["environment"],
                },
                "resolvedDependencies": _dependencies(record),
            },
            "runDetails": {
                "builder": {
                    "id": "urn:post-training:entrypoint",
                    "version": {"post-training": record["packages"]["post-training"]},
                },
                "metadata": {
                    "invocationId": record["run_id"],
                    "startedOn": _utc(record["attempts"][0]["started"]),
                    "finishedOn": _utc(record["attempts"][-1]["ended"]),
                },
                "byproducts": [
                    {"name": name, "digest": {"sha256": digest}}
                    for name, digest in sorted((packed or {}).items())
                    if name not in record["outputs"]["files"]
                ],
            },
        },
    }


def _dependencies(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The image as OCI configuration and as file, the code's commit, the inputs."""
    image, code = record["image"], record["code"]
    found: list[dict[str, Any]] = []
    if image:
        digests = {"OCI config": image["oci_digest"], "squashfs": image["sqsh_sha256"]}
        if "sif_sha256" in image:
            digests["SIF"] = image["sif_sha256"]
        found += [
            {
                "name": f"image {image['name']} {image['version']}, {what}",
                "digest": {"sha256": digest.removeprefix("sha256:")},
            }
            for what, digest in digests.items()
        ]
    if code.get("commit"):
        found.append({"name": "code", "digest": {"gitCommit": code["commit"]}})
    found += [
        # Of a folder it is no file's sha256: core/hashing.py says how it is made.
        {"name": key, "digest": {"fingerprint": value["fingerprint"]}}
        for key, value in record["inputs"].items()
    ]
    return found


def _utc(time: str) -> str:
    """RFC 3339 with Z, as the specification asks."""
    return time.replace("+00:00", "Z")
