"""The rows that the YAML of TRL and open-instruct names, one dataset or several."""

from typing import Any

from post_training.importers.training_arguments import tell_dataset, use_dataset_path
from post_training.importers.translation import Nothing, Ours, Table, Translation


def use_dataset(translation: Translation, key: str, value: Any) -> None:
    if value is None:
        translation.tell(key, "not set")
        return
    dataset: dict[str, Any] = {}
    use_dataset_path(translation, key, value, dataset)
    if "hub" in dataset or "." not in str(value).rsplit("/", 1)[-1]:
        dataset["split"] = translation.get("dataset_train_split", "train")
    if subset := translation.get("dataset_config"):
        dataset["subset"] = subset
    if most := translation.get("max_train_samples"):
        dataset["max_rows"] = most
    block = translation.settings.setdefault("data", {})
    block["datasets"] = [dataset]
    translation.tell(key, "data.datasets")
    if "hub" in dataset and translation.get("eval_strategy", "no") not in ("no", False):
        split = translation.get("dataset_test_split", "test")
        translation.settings.setdefault("evaluation", {})["datasets"] = [dataset | {"split": split}]


def use_mixer(translation: Translation, key: str, value: Any) -> None:
    """open-instruct: {path or name: share or number}, or a list of them in turn."""
    if isinstance(value, list) and len(value) % 2:
        translation.refuse(key, f"must be names and amounts in turn: {value[-1]} has no amount")
        return
    if isinstance(value, list):
        pairs = list(zip(value[::2], value[1::2], strict=True))
    else:
        pairs = list((value or {}).items())
    datasets = []
    for name, amount in pairs:
        dataset: dict[str, Any] = {}
        use_dataset_path(translation, key, name, dataset)
        if "hub" in dataset:
            dataset["split"] = "train"
        number = float(amount)
        if number != 1 or "." not in str(amount):
            dataset["subsample_factor"] = number if "." in str(amount) else int(number)
        datasets.append(dataset)
    if (most := translation.get("max_train_samples")) and len(datasets) == 1:
        datasets[0]["max_rows"] = most
    translation.settings.setdefault("data", {})["datasets"] = datasets
    translation.tell(key, f"data.datasets: {len(datasets)}")


def use_mixture(translation: Translation, key: str, value: Any) -> None:
    """TRL's list of datasets, each with a path, and maybe a name, a split and columns."""
    found = []
    for index, given in enumerate(value):
        place, dataset = f"{key}[{index}]", {}
        use_dataset_path(translation, place, given["path"], dataset)
        is_file = "path" in dataset and "." in given["path"].rsplit("/", 1)[-1]
        if not is_file:
            dataset["split"] = given.get("split") or "train"
        elif given.get("split"):
            told = f"{given['split']}: a file has one split, and no name for it"
            translation.tell(f"{place}.split", told)
        if given.get("name"):
            dataset["subset"] = given["name"]
        if given.get("fraction"):
            dataset["subsample_factor"] = given["fraction"]
        for name in sorted(given.keys() - {"path", "name", "split", "fraction", "columns"}):
            if given[name] is not None:
                translation.refuse(f"{place}.{name}", f"{given[name]}: no counterpart")
        if given.get("columns"):
            translation.tell(f"{place}.columns", "columns that nothing reads are left out")
        found.append(dataset)
        tell_dataset(translation, place, given, dataset)
    translation.settings.setdefault("data", {})["datasets"] = found
    translation.tell(key, f"data.datasets: {len(found)}")


def use_text_field(translation: Translation, key: str, value: Any) -> None:
    if value == "text":
        translation.tell(key, "no setting needed: the column text is read, where there is one")
    else:
        translation.refuse(
            key,
            "name the column by --set 'data.datasets[0].columns={text: "
            f"{value}}}' and --set data.datasets[0].format=text, and --drop {key}",
        )


def use_most_rows(translation: Translation, key: str, value: Any) -> None:
    """The first rows of the whole mixture; max_rows is of one dataset."""
    if value is None:
        translation.tell(key, "not set")
    elif _is_one_dataset(translation):
        translation.tell(key, f"max_rows of the dataset: {value}")
    else:
        translation.refuse(
            key,
            "of the whole mixture: --drop it, and say of each dataset how many rows by --set "
            "'data.datasets[0].max_rows=…'",
        )


def _is_one_dataset(translation: Translation) -> bool:
    mixers = [translation.get(key) for key in ("dataset_mixer", "dataset_mixer_list", "mixer_list")]
    numbers = [len(each) // (2 if isinstance(each, list) else 1) for each in mixers if each]
    return sum(numbers, bool(translation.get("dataset_name"))) == 1


_FROM_DATASET = Ours("it goes with dataset_name")
ROWS: Table = {
    "dataset_name": use_dataset,
    "dataset_config": _FROM_DATASET,
    "dataset_train_split": _FROM_DATASET,
    "dataset_test_split": _FROM_DATASET,
    "dataset_text_field": use_text_field,
    "datasets": use_mixture,
    "dataset_kwargs": Nothing("rows are always prepared, and templates write special tokens"),
    "dataset_streaming": Nothing("rows are prepared once, before training"),
    "streaming": Nothing("rows are prepared once, before training"),
    "test_split_size": Nothing("`entrypoint split` makes the rows to evaluate on, once"),
    "shuffle_dataset": Ours("each epoch has an order of its own"),
    "eval_packing": Ours("rows of the evaluation are never packed"),
    "truncation_mode": Ours("the end of a longer sequence is cut off", ("keep_start",)),
    "dataset_mixer": use_mixer,
    "dataset_mixer_list": use_mixer,
    "mixer_list": use_mixer,
    "max_train_samples": use_most_rows,
}
