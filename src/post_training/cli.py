"""The command line on the host: `post-training …`. Every import of weight is inside its command."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any


def main() -> None:
    """Errors become one clear line and the exit code."""
    from post_training.core.errors import report

    arguments = sys.argv[1:]
    if arguments[:2] in (["edf", "run"], ["edf", "resolve"]):
        from post_training.images import edf_command

        sys.exit(edf_command.main(arguments[1:]))
    try:
        build_app()()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report(error))


def build_app() -> Any:
    """The typer application; its `--help` imports neither pydantic nor anything of the stack."""
    import typer

    settings: dict[str, Any] = {"no_args_is_help": True, "add_completion": False}
    app = typer.Typer(
        help="Reproducible post-training of language models, one image digest a run.",
        pretty_exceptions_enable=False,
        **settings,
    )
    image = typer.Typer(help="Build images and keep the image store.", **settings)
    edf = typer.Typer(help="Render, check and run EDF files.", **settings)
    runs = typer.Typer(help="Look at runs.", **settings)
    experiment = typer.Typer(help="Folders of experiments.", **settings)
    storage = typer.Typer(help="Scratch, and what must outlive it.", **settings)
    artifact = typer.Typer(help="Look at what runs made, and check it.", **settings)
    data = typer.Typer(help="Look at data as training reads it, and fetch it.", **settings)
    pipeline = typer.Typer(
        help="Run, submit and watch stages that build on each other.", **settings
    )
    app.add_typer(image, name="image")
    app.add_typer(edf, name="edf")
    app.add_typer(runs, name="runs")
    app.add_typer(artifact, name="artifact")
    app.add_typer(storage, name="storage")
    app.add_typer(experiment, name="experiment")
    app.add_typer(data, name="data")
    app.add_typer(pipeline, name="pipeline")

    Store = Annotated[Path | None, typer.Option(help="The image store.", show_default=False)]
    Repository = Annotated[Path, typer.Option(help="The checkout of post-training.")]
    Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

    @image.command("build")
    def image_build(
        name: Annotated[str, typer.Argument(help="A folder of containers/.")] = "cpu",
        store: Store = None,
        repository: Repository = Path("."),
        force: Annotated[bool, typer.Option(help="Build even if the store has it.")] = False,
    ) -> None:
        """Build containers/NAME into an OCI image, unless its input hash is built already."""
        from post_training.images import commands

        commands.build(name, store, repository, force=force)

    @image.command("push-sqsh")
    def image_push_sqsh(
        name: Annotated[str, typer.Argument(help="A folder of containers/.")] = "cpu",
        site: Annotated[str, typer.Option(help="The site file of edf/ to render from.")] = "laptop",
        store: Store = None,
        repository: Repository = Path("."),
    ) -> None:
        """Put the built image into the store as a squashfs, and render edf/post-training.toml."""
        from post_training.images import commands

        commands.push(name, site, store, repository)

    @image.command("push-sif")
    def image_push_sif(
        name: Annotated[str, typer.Argument(help="A folder of containers/.")] = "cpu",
        site: Annotated[
            str | None,
            typer.Option(help="Render edf/post-training.toml for this site.", show_default=False),
        ] = None,
        store: Store = None,
        repository: Repository = Path("."),
    ) -> None:
        """Put the built image into the store as a SIF: the same squashfs, for Singularity."""
        from post_training.images import commands
        from post_training.launch import render_command

        commands.push_sif(name, store, repository)
        if site is not None:
            path = render_command.install(name, site, store, repository)
            print(f"EDF: {path}", file=sys.stderr)

    @image.command("lock")
    def image_lock(
        name: Annotated[str, typer.Argument(help="A folder of containers/.")] = "cpu",
        base: Annotated[
            str | None,
            typer.Option(
                help="Where to read a registry's base instead: docker://MIRROR/NAME:TAG or "
                "oci:FOLDER:TAG.",
                show_default=False,
            ),
        ] = None,
        store: Store = None,
        repository: Repository = Path("."),
    ) -> None:
        """Resolve what containers/NAME asks for into locks; exit 1 where something stays open."""
        from post_training.images import commands

        sys.exit(commands.lock(name, base, store, repository))

    @image.command("context")
    def image_context(
        name: Annotated[str, typer.Argument(help="A folder of containers/.")],
        folder: Annotated[Path, typer.Argument(help="A new folder.")],
        store: Store = None,
        repository: Repository = Path("."),
    ) -> None:
        """Put all that a build reads into one folder, for builders other than ours."""
        from post_training.images import commands

        commands.context(name, folder, store, repository)

    @image.command("list")
    def image_list(store: Store = None, as_json: Json = False) -> None:
        """The images in the store, the last pushed first."""
        from post_training.images import commands

        commands.show_list(store, as_json=as_json)

    Reference = Annotated[
        str,
        typer.Argument(
            help="OCI digest, sha256 of the squashfs or SIF (8 digits are enough) or NAME."
        ),
    ]

    @image.command("show")
    def image_show(reference: Reference, store: Store = None) -> None:
        """The whole record of an image, as JSON."""
        from post_training.images import commands

        print(json.dumps(commands.open_store(store).find(reference), indent=2))

    @image.command("verify")
    def image_verify(reference: Reference, store: Store = None) -> None:
        """Hash an image again: ok, missing or corrupt."""
        from post_training.images import commands

        sys.exit(commands.verify(reference, store))

    @image.command("rebuild")
    def image_rebuild(
        reference: Reference,
        store: Store = None,
        repository: Repository = Path("."),
        cached: Annotated[
            bool, typer.Option("--cached", help="Take the layers that buildah has.")
        ] = False,
    ) -> None:
        """Build an image again from its commit: exit 0 identical, 4 differs (which paths)."""
        from post_training.images import commands

        sys.exit(commands.rebuild(reference, store, repository, cached=cached))

    @image.command("release")
    def image_release(
        reference: Reference,
        tests: Annotated[
            list[str] | None,
            typer.Argument(
                help="Instead of its whole tests: arguments of pytest.", metavar="TESTS"
            ),
        ] = None,
        store: Store = None,
        repository: Repository = Path("."),
    ) -> None:
        """Test an image with the tests of its commit, then write containers/images.lock."""
        from post_training.images import commands

        commands.release(reference, tests or [], store, repository)

    @image.command("gc")
    def image_gc(
        runs: Annotated[
            list[Path] | None,
            typer.Argument(help="Folders with runs, remembered.", show_default=False),
        ] = None,
        delete: Annotated[bool, typer.Option("--delete", help="Remove them.")] = False,
        forget: Annotated[
            Path | None, typer.Option(help="A folder of runs that is gone.", show_default=False)
        ] = None,
        store: Store = None,
        repository: Repository = Path("."),
    ) -> None:
        """Which images no run names, no EDF pins and no release has; --delete removes them."""
        from post_training.images import commands

        commands.gc(runs or [], forget, store, repository, delete=delete)

    @edf.command("render")
    def edf_render(
        image: Annotated[
            str, typer.Option(help="Digest or name of an image in the store.")
        ] = "cpu",
        site: Annotated[str, typer.Option(help="A site file of edf/.")] = "laptop",
        form: Annotated[
            str | None,
            typer.Option("--as", help="edf or singularity; else the site's own.", metavar="FORM"),
        ] = None,
        store: Store = None,
        repository: Repository = Path("."),
    ) -> None:
        """Print an image's EDF for a site, or the script that runs Singularity there."""
        from post_training.launch import render_command

        print(render_command.render(image, site, form, store, repository), end="")

    @edf.command("check")
    def edf_check(
        environment: Annotated[str, typer.Argument(help="NAME, NAME.toml or a path, as for srun.")],
        repository: Repository = Path("."),
    ) -> None:
        """Tell every fault of an EDF at once, without running it; exit 2 where there is one."""
        from post_training.images import commands

        commands.check(environment, repository)

    @edf.command("run")
    def edf_run() -> None:
        """Run a command in an EDF's image: `edf run NAME -- COMMAND …`."""

    @edf.command("resolve")
    def edf_resolve() -> None:
        """Check an EDF and print its path: `edf resolve NAME`."""

    @runs.command("show")
    def runs_show(
        run: Annotated[Path, typer.Argument(help="A run folder.")], as_json: Json = False
    ) -> None:
        """What a run was, in which image, from what, and what came out."""
        from post_training.records import show

        show.show_run(run, as_json=as_json)

    @runs.command("diff")
    def runs_diff(
        first: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
        second: Annotated[Path, typer.Argument(metavar="OTHER", help="Another.")],
    ) -> None:
        """Every setting that differs, and where the outcomes part: exit 0 the same, 4 different."""
        from post_training.records import diff

        sys.exit(diff.print_diff(first, second))

    Artifact = Annotated[Path, typer.Argument(metavar="FOLDER", help="With artifact.json.")]

    @experiment.command("new")
    def experiment_new(
        name: Annotated[str, typer.Argument(help="Small letters, digits and hyphens.")],
        parent: Annotated[Path, typer.Option(help="Where its folder is made.")] = Path(
            "reproducibility"
        ),
    ) -> None:
        """Make a folder with a pipeline that runs, and a page to be filled in."""
        from post_training.launch.experiment import new_experiment

        print(new_experiment(name, parent))

    SiteName = Annotated[str, typer.Option(help="laptop, clariden, …")]

    @storage.command("setup")
    def storage_setup(
        site: SiteName,
        group: Annotated[
            str | None, typer.Option(help="Who shares it, by default as the folder has it.")
        ] = None,
    ) -> None:
        """Make artifacts/{private,shared,store}: folders of the site, and links to them."""
        from post_training.launch import storage
        from post_training.launch.site import load_site

        storage.setup(site, load_site(site, {}), group)

    @storage.command("promote")
    def storage_promote(
        folder: Artifact,
        name: Annotated[str | None, typer.Option(help="Of the copy.", show_default=False)] = None,
    ) -> None:
        """Copy an artifact to artifacts/store, every file compared."""
        from post_training.launch import storage

        storage.promote(folder, name)

    @storage.command("doctor")
    def storage_doctor(
        site: SiteName,
        folder: Annotated[Path, typer.Argument(help="On scratch.")] = Path("."),
        margin: Annotated[int, typer.Option(min=0, help="Days before the deletion.")] = 7,
        as_json: Json = False,
    ) -> None:
        """Warn of files that the site is about to delete: exit 1 when there are any."""
        from post_training.launch import storage
        from post_training.launch.site import load_site

        sys.exit(storage.doctor(folder, site, load_site(site, {}), margin, as_json=as_json))

    @artifact.command("show")
    def artifact_show(folder: Artifact, as_json: Json = False) -> None:
        """What it is, and which run made it."""
        from post_training.records import lineage

        lineage.show_artifact(folder, as_json=as_json)

    @artifact.command("lineage")
    def artifact_lineage(folder: Artifact, as_json: Json = False) -> None:
        """All it came from: runs, models, data, as a tree."""
        from post_training.records import lineage

        lineage.show_lineage(folder, as_json=as_json)

    @artifact.command("verify")
    def artifact_verify(folder: Artifact) -> None:
        """Hash its files again: ok, or the files that are not what they were."""
        from post_training.records import lineage

        lineage.verify_artifact(folder)

    @runs.command("list")
    def runs_list(
        folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"),
        as_json: Json = False,
    ) -> None:
        """Runs below a folder: state, progress, loss, speed, time left, and why they ended."""
        from post_training.launch import run_commands

        run_commands.list_runs(folder, as_json=as_json)

    @runs.command("logs")
    def runs_logs(
        run: Annotated[Path, typer.Argument(help="The folder of a submitted run.")],
        worker: Annotated[
            int | None, typer.Option(help="Of this worker of an array.", show_default=False)
        ] = None,
        lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="The last ones.")] = 50,
        follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows.")] = False,
    ) -> None:
        """What a run's job printed, with all its attempts."""
        from post_training.launch import run_commands

        run_commands.show_log(run, worker=worker, num_lines=lines, follow=follow)

    @runs.command("cancel")
    def runs_cancel(
        folders: Annotated[
            list[Path], typer.Argument(metavar="FOLDER…", help="Runs, or folders of runs.")
        ],
    ) -> None:
        """Stop the jobs of runs for good; a pipeline's folder stops all of it."""
        from post_training.launch import run_commands

        run_commands.cancel_runs(folders)

    @app.command("doctor")
    def doctor(
        site: Annotated[str, typer.Option(help="laptop, clariden, lumi, …")] = "laptop",
        store: Store = None,
    ) -> None:
        """Say what of this machine is not ready for a site's jobs; exit 1 if anything is wrong."""
        from post_training.core.findings import print_findings
        from post_training.images.commands import open_store
        from post_training.launch.doctor import examine_host

        sys.exit(print_findings(examine_host(site, open_store(store))))

    @app.command("submit")
    def submit_stage(
        stage: Annotated[str, typer.Argument(help="As for entrypoint: sft, prepare, …")],
        config: Annotated[Path, typer.Argument(metavar="CFG.YAML", show_default=False)],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="KEY=VALUE", help="Settings to change.", show_default=False),
        ] = None,
        site: Annotated[str, typer.Option(help="How jobs are run: laptop, clariden, …")] = "laptop",
        environment: Annotated[
            str, typer.Option(metavar="NAME|FILE", help="The EDF of the image.")
        ] = "post-training",
        nodes: Annotated[int | None, typer.Option(show_default=False)] = None,
        time: Annotated[
            str | None, typer.Option(help="Wall time of one attempt.", show_default=False)
        ] = None,
        partition: Annotated[str | None, typer.Option(show_default=False)] = None,
        account: Annotated[str | None, typer.Option(show_default=False)] = None,
        reservation: Annotated[str | None, typer.Option(show_default=False)] = None,
        max_failures: Annotated[
            int, typer.Option(min=0, help="Failures in a row that may be tried again.")
        ] = 3,
        dev: Annotated[
            Path | None,
            typer.Option(metavar="CHECKOUT", help="Run a copy of this checkout's sources."),
        ] = None,
        chain: Annotated[
            int,
            typer.Option(min=1, help="Jobs that go on from each other, where none is requeued."),
        ] = 1,
        dry_run: Annotated[bool, typer.Option(help="Print what would be submitted.")] = False,
    ) -> None:
        """Queue a stage in Slurm; it resumes by itself after wall time, preemption and failures."""
        from post_training.stages import submit_command

        changes = {
            "nodes": nodes,
            "time": time,
            "partition": partition,
            "account": account,
            "reservation": reservation,
        }
        submit_command.submit_stage(
            stage,
            config,
            overrides or [],
            (site, changes),
            environment,
            max_failures=max_failures,
            dev=dev,
            num_chained=chain,
            dry_run=dry_run,
        )

    PipelineFile = Annotated[Path, typer.Argument(metavar="PIPELINE.YAML", show_default=False)]
    PipelineOverrides = Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="stages.NAME.config.KEY=VALUE, run_dir=…",
            show_default=False,
        ),
    ]
    Checkout = Annotated[
        Path | None,
        typer.Option("--dev", metavar="CHECKOUT", help="Run this checkout's sources."),
    ]

    @pipeline.command("run")
    def pipeline_run(
        file: PipelineFile,
        overrides: PipelineOverrides = None,
        environment: Annotated[
            str | None,
            typer.Option(
                metavar="NAME|FILE",
                help="The EDF to run in; post-training where the stack is not installed.",
                show_default=False,
            ),
        ] = None,
        dev: Checkout = None,
        unpinned: Annotated[
            bool, typer.Option("--unpinned", help="Without an image; the records say so.")
        ] = False,
    ) -> None:
        """Run on this machine what is not finished, one stage after another."""
        from post_training.stages import pipeline_commands

        where = pipeline_commands.Where(environment, dev)
        pipeline_commands.run_pipeline(file, overrides or [], where, unpinned=unpinned)

    @pipeline.command("submit")
    def pipeline_submit(
        file: PipelineFile,
        overrides: PipelineOverrides = None,
        site: Annotated[str, typer.Option(help="How jobs are run: laptop, clariden, …")] = "laptop",
        environment: Annotated[
            str, typer.Option(metavar="NAME|FILE", help="The EDF of the image.")
        ] = "post-training",
        partition: Annotated[str | None, typer.Option(show_default=False)] = None,
        account: Annotated[str | None, typer.Option(show_default=False)] = None,
        reservation: Annotated[str | None, typer.Option(show_default=False)] = None,
        max_failures: Annotated[
            int, typer.Option(min=0, help="Failures in a row that may be tried again.")
        ] = 3,
        dev: Checkout = None,
        dry_run: Annotated[bool, typer.Option(help="Print what would be submitted.")] = False,
    ) -> None:
        """Queue in Slurm what is not finished, each stage after those it needs."""
        from post_training.stages import pipeline_commands

        changes = {"partition": partition, "account": account, "reservation": reservation}
        where = pipeline_commands.Where(environment, dev, (site, changes))
        pipeline_commands.submit_pipeline(
            file, overrides or [], where, max_failures=max_failures, dry_run=dry_run
        )

    @pipeline.command("status")
    def pipeline_status(
        file_or_folder: Annotated[Path, typer.Argument(metavar="PIPELINE.YAML|FOLDER")],
        as_json: Json = False,
    ) -> None:
        """Each stage: its state, how far it is, and why it failed."""
        from post_training.stages import pipeline_commands

        pipeline_commands.show_pipeline(file_or_folder, as_json=as_json)

    Config = Annotated[
        Path | None,
        typer.Argument(help="Of sft or prepare.", metavar="CFG.YAML", show_default=False),
    ]
    Overrides = Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to change.", show_default=False),
    ]
    Indexed = Annotated[
        Path | None,
        typer.Option(metavar="PREFIX", help="Instead: of PREFIX_text_document.bin and .idx."),
    ]
    Environment = Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="The EDF to run in; post-training where the stack is not installed.",
            show_default=False,
        ),
    ]

    @data.command("inspect")
    def data_inspect(
        config: Config = None,
        overrides: Overrides = None,
        indexed: Indexed = None,
        tokenizer: Annotated[
            Path | None,
            typer.Option(help="With --indexed: a SentencePiece model, or a tokenizer's folder."),
        ] = None,
        num_samples: Annotated[int, typer.Option(min=1, help="How many rows.")] = 5,
        row: Annotated[
            int | None, typer.Option(min=1, help="This row alone, of all the data; from 1.")
        ] = None,
        html: Annotated[
            Path | None, typer.Option(metavar="PAGE.HTML", help="Write a page instead.")
        ] = None,
        environment: Environment = None,
    ) -> None:
        """Show rows as text, tokens and ids, and what of them is trained."""
        from post_training.core.errors import UsageError
        from post_training.images.enter import enter_image

        _check_source(config, indexed)
        if (indexed is None) != (tokenizer is None):
            raise UsageError("give --tokenizer with --indexed, and only with it")
        enter_image(environment, {"--html": html})
        from post_training.stages import data_commands

        if indexed is not None:
            data_commands.inspect_indexed(indexed, tokenizer, num_samples, row, html)
        else:
            data_commands.inspect_config(config, overrides or [], num_samples, row, html)

    @data.command("count")
    def data_count(
        config: Config = None,
        overrides: Overrides = None,
        indexed: Indexed = None,
        as_json: Json = False,
        per_sample: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="Also write the tokens of each sample (TSV)."),
        ] = None,
        environment: Environment = None,
    ) -> None:
        """Tokens per source, and how long the sequences are."""
        from post_training.images.enter import enter_image

        _check_source(config, indexed)
        enter_image(environment, {"--per-sample": per_sample})
        from post_training.stages import data_commands

        if indexed is not None:
            data_commands.count_indexed(indexed, as_json=as_json, per_sample=per_sample)
        else:
            data_commands.count_config(
                config, overrides or [], as_json=as_json, per_sample=per_sample
            )

    @data.command("fetch")
    def data_fetch(
        hub: Annotated[str, typer.Argument(help="OWNER/NAME of a dataset.")],
        hub_dir: Annotated[Path, typer.Option(help="data.hub_dir of the configurations.")],
        revision: Annotated[
            str | None, typer.Option(help="A branch, tag or commit; else the main branch.")
        ] = None,
        subset: Annotated[str | None, typer.Option(help="One of the dataset's subsets.")] = None,
        split: Annotated[str, typer.Option(help="One of its splits.")] = "train",
        environment: Environment = None,
    ) -> None:
        """Download a dataset of the Hugging Face hub, and print how to name it."""
        from post_training.images.enter import enter_image

        enter_image(environment, {"--hub-dir": hub_dir})
        from post_training.stages import data_commands

        data_commands.fetch_dataset(hub, revision, subset, split, hub_dir)

    @app.command("reproduce")
    def reproduce_run(
        run: Annotated[Path, typer.Argument(help="A finished run's folder, or an artifact in it.")],
        run_dir: Annotated[Path | None, typer.Option(help="Where to run again.")] = None,
        store: Store = None,
        upstream: Annotated[
            bool, typer.Option("--upstream", help="Everything its inputs came from, too.")
        ] = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Say what is missing, and run nothing.")
        ] = False,
        tolerance: Annotated[
            float, typer.Option(min=0, help="Relative, of the figures, on another machine.")
        ] = 0.01,
    ) -> None:
        """Run again from the recorded image digest and compare.

        Exit code 0: identical; 3: equivalent, on another machine; 4: differs."""
        from post_training.reproduce import command

        options = command.Options(run_dir, store, upstream, dry_run, tolerance)
        sys.exit(command.reproduce(run, options))

    return app


def _check_source(config: Path | None, indexed: Path | None) -> None:
    from post_training.core.errors import UsageError

    if (config is None) == (indexed is None):
        raise UsageError("give either a configuration or --indexed PREFIX")


if __name__ == "__main__":
    main()
