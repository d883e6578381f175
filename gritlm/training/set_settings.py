"""Settings of single data sets: the file of --num_samples. Rows per epoch, lengths, and what changes in the loss."""

import dataclasses
from collections.abc import Collection
from typing import Any, get_args, get_type_hints

from gritlm.errors import UserError
from gritlm.strict_json import read_json_object
from gritlm.training.arguments import ObjectiveArguments, RunArguments

LENGTHS = ("query_max_len", "passage_max_len")
# How ranks work together, what widths and files there are, and which side learns: one for all data sets.
OF_THE_RUN = {"negatives_cross_device", "negatives_ring", "emb_q_only", "emb_p_only", "teacher_vectors", "teacher_loss"}
OF_THE_RUN |= {"matryoshka_dims", "matryoshka_weights", "sigreg_weight", "spread_out_weight"}
OF_A_SET = [f.name for f in dataclasses.fields(ObjectiveArguments) if f.name not in OF_THE_RUN]


def read_set_settings(path: str | None) -> dict[str, dict[str, Any]]:
    """Read the settings by data set: `{"nq": 1000}`, or `{"nq": {"rows": 1000, "in_batch_negatives": false}}`.

    The keys of a set are `rows` (per epoch), `query_max_len`, `passage_max_len`, and flags of the loss.

    Raises:
        UserError: the file cannot be read, or a key or a value is wrong.
    """
    if not path:
        return {}
    found = read_json_object(path, "--num_samples", "an object of data set: rows, or of data set: settings")
    types = {"rows": int, **dict.fromkeys(LENGTHS, int), **get_type_hints(ObjectiveArguments)}
    settings: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        settings[name] = value if isinstance(value, dict) else {"rows": value}
        for key, setting in settings[name].items():
            if key not in ("rows", *LENGTHS, *OF_A_SET):
                known = ", ".join(("rows", *LENGTHS, *OF_A_SET))
                raise UserError(f"--num_samples {path}: {name}: found the key {key!r}, wanted some of {known}")
            wanted = _kind(types[key])
            if setting is None and type(None) in get_args(types[key]):  # switches a margin of the run off
                continue
            right = isinstance(setting, (int, float) if wanted is float else wanted)
            if not right or (wanted is not bool and (isinstance(setting, bool) or setting < 0)):
                what = {int: "a number of rows" if key == "rows" else "a whole number", bool: "true or false"}
                raise UserError(
                    f"--num_samples {path}: {name}: {key}: found {setting!r}, wanted {what.get(wanted, 'a number')}"
                )
    return settings


def _kind(hint: Any) -> type:
    """The type of a value that is not None."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if kinds else hint


def rows_of(run: RunArguments) -> dict[str, int]:
    """The rows per epoch of the data sets for which they are set."""
    settings = read_set_settings(run.data.num_samples)
    return {name: own["rows"] for name, own in settings.items() if "rows" in own}


def objectives_of(run: RunArguments, names: Collection[str]) -> dict[str, ObjectiveArguments]:
    """The flags of the loss of each of these data sets, all that there are.

    Raises:
        UserError: there are settings of another data set.
    """
    settings = read_set_settings(run.data.num_samples)
    if unknown := sorted(settings.keys() - set(names)):
        raise UserError(f"--num_samples: found data set {unknown[0]!r}, wanted some of {', '.join(names)}")
    changes = {name: {key: v for key, v in settings.get(name, {}).items() if key in OF_A_SET} for name in names}
    return {name: dataclasses.replace(run.objective, **own) for name, own in changes.items()}


def stays_apart(args: ObjectiveArguments) -> bool:
    """Whether a data set's rows must not share a batch with others: their negatives, or the order of their scores."""
    return not args.in_batch_negatives or args.cosent_weight > 0 or args.angle_weight > 0


def lengths_of(run: RunArguments, names: Collection[str]) -> dict[str, tuple[int, int]]:
    """The longest query and passage of each of these data sets, in tokens.

    Raises:
        UserError: a length is above the run's, which is what the model is served with.
    """
    limits, lengths = (run.data.query_max_len, run.data.passage_max_len), {}
    settings = read_set_settings(run.data.num_samples)
    for name in names:
        query, passage = (settings.get(name, {}).get(key, limit) for key, limit in zip(LENGTHS, limits, strict=True))
        for key, length, limit in zip(LENGTHS, (query, passage), limits, strict=True):
            if not 0 < length <= limit:
                raise UserError(f"--num_samples: {name}: {key}: found {length}, wanted at most --{key} {limit}")
        lengths[name] = query, passage
    return lengths
