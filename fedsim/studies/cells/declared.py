"""The comparison that a study's folder remembers, so that a study can be gone on with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.basics.errors import RunError, ScenarioError
from fedsim.basics.json_files import taking, write_json_atomic
from fedsim.runs.left_behind import code_sha256_of
from fedsim.scenario.scenario import Scenario
from fedsim.studies.cells.variants import Variant

STUDY_FILE = "study.json"


class Declared(NamedTuple):
    """What a study compares.

    Attributes:
        variants: What is held beside what.
        seeds: The seeds of each.
    """

    variants: Sequence[Variant]
    seeds: Sequence[int]


def is_study(path: str) -> bool:
    """Return whether a path is a study's folder."""
    return (Path(path) / STUDY_FILE).is_file()


def remember(declared: Declared, study: Path) -> None:
    """Write what a study compares into its folder."""
    document = {
        "seeds": list(declared.seeds),
        "variants": [
            {
                "labels": dict(variant.labels),
                "origin": variant.scenario.origin,
                "scenario": variant.scenario.resolved(),
                "given": {str(seed): str(path.absolute()) for seed, path in variant.given.items()},
            }
            for variant in declared.variants
        ],
    }
    with taking(study / STUDY_FILE):
        write_json_atomic(study / STUDY_FILE, document)


def recall(study: Path) -> Declared:
    """Read what a study compares.

    Raises:
        ScenarioError: If the file is none of a study.
    """
    import json

    place = study / STUDY_FILE
    try:
        # read as it stands: a title may well be "nan"
        document = json.loads(place.read_bytes())
        variants = [_variant(each, str(place)) for each in document["variants"]]
        return Declared(variants, [int(seed) for seed in document["seeds"]])
    except OSError as error:
        raise RunError(f"{place}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ScenarioError):
            raise
        raise ScenarioError(f"{place}: is not what a study wrote: {error!r}") from None


def _variant(document: Mapping[str, Any], origin: str) -> Variant:
    scenario = Scenario.from_resolved(document["scenario"], str(document.get("origin", origin)))
    given = {int(seed): Path(path) for seed, path in document["given"].items()}
    labels = {str(k): str(v) for k, v in document["labels"].items()}
    code = None
    for folder in given.values():
        code = code_sha256_of(folder)
    return Variant(labels, scenario, given, code)
