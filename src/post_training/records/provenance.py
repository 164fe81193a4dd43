"""A run's record in the two forms that the tools of others read; pure functions of the record.

**Workflow Run RO-Crate**, by its profile for one run of one program (Process Run Crate 0.5): what
people and catalogues of research data read, of any run that has ended.
https://www.researchobject.org/workflow-run-crate/profiles/process_run_crate
https://www.researchobject.org/ro-crate/specification/1.1/

**in-toto statement with SLSA's provenance**: what was made, of what, by what; of a finished run
alone. Only this form can be signed by the tools of supply chains. It is not signed here: `cosign
attest-blob --statement` and the like do that for its owner.
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
https://slsa.dev/spec/v1.0/provenance
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from post_training.records.run_record import CONFIG_NAME, RECORD_NAME

CRATE_NAME = "ro-crate-metadata.json"
_SPECIFICATION = "https://w3id.org/ro/crate/1.1"
_PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
_CONTEXT = [f"{_SPECIFICATION}/context", "https://w3id.org/ro/terms/workflow-run/context"]
_COMPLETED, _FAILED = (f"http://schema.org/{word}ActionStatus" for word in ("Completed", "Failed"))
_PROGRAM = "urn:post-training"
_MEDIA_TYPES = {"json": "application/json", "yaml": "application/yaml"}
STATEMENT_NAME = "provenance.intoto.json"
_BUILD_TYPE = "urn:post-training:stage-run:1"


def make_crate(record: dict[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """The content of ro-crate-metadata.json.

    record: of a run that has ended.
    files: the names in the archive, run.json and config.yaml among them.
    """
    first, last = record["attempts"][0], record["attempts"][-1]
    image, inputs, outputs = _image(record["image"]), _inputs(record), _outputs(record)
    environment = _environment(record["environment"])
    about = [f"post-training {record['stage']}, run {record['run_id']}: {record['status']}."]
    if image:
        about.append(f"Image {record['image']['oci_digest']}.")
    action = {
        "@id": f"#{record['run_id']}",
        "@type": "CreateAction",
        "name": f"post-training {record['stage']}",
        "description": " ".join(record["command"]),
        "instrument": {"@id": _PROGRAM},
        "startTime": first["started"],
        **({"endTime": last["ended"]} if last["ended"] else {}),
        **_end(record),
        **({"containerImage": {"@id": image[0]["@id"]}} if image else {}),
        "environment": _references(environment),
        "object": [{"@id": CONFIG_NAME}, *_references(inputs)],
        "result": [{"@id": RECORD_NAME}, *_references(outputs)],
    }
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"{record['stage']} {record['run_id']}",
        "description": " ".join(about),
        "datePublished": last["ended"] or last["started"],
        "license": "Not stated: the run's owner decides.",
        "conformsTo": {"@id": _PROFILE},
        "hasPart": [{"@id": name} for name in files],
        "mentions": {"@id": action["@id"]},
    }
    return {
        "@context": _CONTEXT,
        "@graph": [
            {
                "@id": CRATE_NAME,
                "@type": "CreativeWork",
                "conformsTo": {"@id": _SPECIFICATION},
                "about": {"@id": "./"},
            },
            root,
            {
                "@id": _PROFILE,
                "@type": "CreativeWork",
                "name": "Process Run Crate",
                "version": "0.5",
            },
            _program(record),
            action,
            *image,
            *inputs,
            *outputs,
            *environment,
            *(_file(name) for name in files),
        ],
    }


def make_statement(
    record: dict[str, Any], *, gone: Collection[str] = (), packed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The content of provenance.intoto.json; its subjects are the files that the run made.

    record: of a finished run.
    gone: of these files, what is not there any more, and so is not stated.
    packed: sha256 of the files that the statement goes with, such as the record.
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


def _end(record: dict[str, Any]) -> dict[str, str]:
    if record["status"] == "finished":
        return {"actionStatus": _COMPLETED}
    # Of one that was killed nobody could write why.
    return {"actionStatus": _FAILED, "error": record["reason"] or "killed"}


def _environment(variables: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"@id": f"#environment-{name}", "@type": "PropertyValue", "name": name, "value": value}
        for name, value in variables.items()
    ]


def _program(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "@id": _PROGRAM,
        "@type": "SoftwareApplication",
        "name": "post-training",
        "softwareVersion": record["packages"]["post-training"],
        "identifier": record["code"].get("commit") or "unknown commit",
    }


def _image(image: dict[str, Any] | None) -> list[dict[str, Any]]:
    if image is None:
        return []
    return [
        {
            "@id": f"#{image['oci_digest']}",
            "@type": "ContainerImage",
            "additionalType": {"@id": "https://w3id.org/ro/terms/workflow-run#SIFImage"}
            if image.get("sif_sha256")
            else {"@id": "https://w3id.org/ro/terms/workflow-run#DockerImage"},
            "name": image["name"],
            "tag": image["version"],
            "sha256": image["oci_digest"].removeprefix("sha256:"),
        }
    ]


def _inputs(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Named by what is in them; two settings may name the same."""
    found = {}
    for key, value in record["inputs"].items():
        maker = value.get("made_by")
        told = f"{maker['kind']} of run {maker['run_id']}" if maker else "of unrecorded origin"
        found[value["fingerprint"]] = {
            "@id": f"#fingerprint-{value['fingerprint']}",
            "@type": "CreativeWork",
            "name": key,
            "description": f"{told}; it was at {value['path']}",
            "identifier": value["fingerprint"],
        }
    return list(found.values())


def _outputs(record: dict[str, Any]) -> list[dict[str, Any]]:
    made = (record["outputs"] or {"artifacts": {}})["artifacts"]
    return [
        {
            "@id": f"#fingerprint-{each['fingerprint']}",
            "@type": "CreativeWork",
            "name": kind,
            "description": f"{each['path']} in the run's folder; run.json has its files' sha256",
            "identifier": each["fingerprint"],
        }
        for kind, each in made.items()
    ]


def _file(name: str) -> dict[str, Any]:
    media_type = _MEDIA_TYPES.get(name.rpartition(".")[2], "text/plain")
    return {"@id": name, "@type": "File", "name": name, "encodingFormat": media_type}


def _references(entities: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"@id": entity["@id"]} for entity in entities]


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
