"""The files under evidence/: what was measured, typed, so that cards print nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from adapterhub.errors import ManifestError
from adapterhub.packaging.manifest import BaseMismatch, DatasetLock, Frozen, Hardware, Sha256
from adapterhub.packaging.problems import first_problem

LEDGER = "evidence/ledger.json"
CURVE = "evidence/curve.json"
SCORES = "evidence/scores.json"
FAILURES = "evidence/failures.jsonl"
FIDELITY = "evidence/fidelity.json"
ROUNDING = "evidence/rounding.json"

Finding = Literal["better", "worse", "no difference shown"]
"""What a paired test of the adapter against the base shows at 5 %: no card calls noise a gain."""


class LedgerPart(Frozen):
    """One line of the memory ledger."""

    name: str
    """Like ``base codes`` or ``saved activations``."""
    bytes: Annotated[int, Field(ge=0)]
    formula: str
    """How it was computed, in words a reader can check."""
    on: Literal["device", "host"] = "device"


class LedgerMiss(Frozen):
    """A plan that was predicted to fit and ran out of memory all the same."""

    step: int
    """Optimizer steps that were done."""
    predicted_peak_bytes: int
    measured_peak_bytes: int | None = None
    """What was held when no more was to be had, measured as the run's own peak. None: not measured."""
    micro_batch: int
    """Rows that went through the model at once."""
    layers_recomputed: int
    message: str
    """The device's own words, first line."""


class LedgerEvidence(Frozen):
    """Memory predicted before the run beside what was measured during it."""

    device: Literal["cpu", "cuda"]
    parts: tuple[LedgerPart, ...]
    predicted_peak_bytes: int
    """Sum of the parts on the device."""
    measured_peak_bytes: int | None = None
    """CUDA: torch's peak reserved plus context; CPU: peak resident set of the process. None: not measured."""
    measured_as: str | None = None
    """How it was measured, in words."""
    misses: tuple[LedgerMiss, ...] = ()
    """Earlier plans of this run that did not fit; ``parts`` are those of the plan that did."""


class CurvePoint(Frozen):
    """One optimizer step."""

    step: int
    loss: float | None = None
    """Mean training loss in nats a token over the step's assistant tokens."""
    eval_loss: float | None = None
    """Held-out loss in nats a token."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    """Before clipping."""


class CurveEvidence(Frozen):
    """The training run, step by step."""

    points: tuple[CurvePoint, ...]
    steps: int
    train_tokens: int
    """Tokens that went through the model, all steps, padding left out."""
    seconds: float
    """Wall time of the training loop, resumed parts added up."""
    tokens_per_second: float
    hardware: Hardware


class Score(Frozen):
    """One figure for base and adapter on the same rows."""

    metric: Literal["exact_match", "loss", "perplexity", "bits_per_byte"]
    unit: str
    """``share of rows``, ``nats a token``, ``perplexity``, ``bits a byte``."""
    rows: int
    base: float
    adapter: float
    base_interval: tuple[float, float] | None = None
    """95 %; Wilson for shares, rows as clusters for a loss."""
    adapter_interval: tuple[float, float] | None = None
    tokens: int | None = None
    """Assistant tokens that a loss is the mean over."""
    p_value: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of a paired test, two-sided: McNemar's exact one for shares; None where none was made."""
    verdict: Finding | None = None
    """What that test shows at 5 %; None where none was made."""


class Example(Frozen):
    """One question that the adapter answers exactly."""

    messages: tuple[dict[str, str], ...]
    """The prompt, ``role`` and ``content``."""
    answer: str
    """What the adapter answered, as generated."""


class Contamination(Frozen):
    """What the scored rows share with the rows that were trained on."""

    train: str
    """Where the training rows were read: a file's or folder's name."""
    train_rows: Annotated[int, Field(ge=1)]
    is_trained_on: bool
    """Whether they are, digest for digest, rows that the manifest says were trained on."""
    same_prompts: Annotated[int, Field(ge=0)]
    """Scored rows whose whole prompt stands in a training row, whatever the answer."""
    shared_sequences: Annotated[int, Field(ge=0)]
    """Scored rows that share 13 words in a row with a training row, system messages left out."""
    examples: tuple[str, ...] = ()
    """Of those with the same prompt, then of the others: at most five places, like ``test.jsonl, line 7``."""


class ScoresEvidence(Frozen):
    """Scores of the base beside the adapter."""

    adapter_sha256: Sha256
    """Of adapter_model.safetensors that was measured."""
    data: DatasetLock
    decoding: dict[str, Any]
    """Generation settings: greedy, max_new_tokens, batch size."""
    scores: tuple[Score, ...]
    example: Example | None = None
    """Of the questions answered exactly, the one with the shortest prompt; None when there is none."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only this many rows were taken, from the top; None: all."""
    left_out: Annotated[int, Field(ge=0)] = 0
    """Rows not measured because prompt and reference do not fit the base's context."""
    base_mismatch: BaseMismatch | None = None
    """The base that was measured on, if it is not the one trained on, and why it was allowed."""
    contamination: Contamination | None = None
    """None: not looked for."""
    tools: dict[str, str] = Field(default_factory=dict)
    """Package name to version, of what generated and scored."""
    hardware: Hardware
    seconds: float
    """Wall time of generating and scoring, without loading."""


class FailureRate(Frozen):
    """How often a sampled answer fails."""

    failed: Annotated[int, Field(ge=0)]
    samples: Annotated[int, Field(ge=1)]
    """Answers that were drawn, all from the recorded seed: the same again with the same batch size."""
    interval: tuple[float, float]
    """95 %, Wilson, of the share that fails."""


class FailureCase(Frozen):
    """One reproducible failure of the adapter."""

    id: str
    """Stable: the first 12 hex digits of the sha256 of messages and check."""
    failure_class: str
    """What kind of failure, like ``wrong_answer`` (``adapterhub.cards.failures`` lists them)."""
    messages: tuple[dict[str, str], ...]
    """The prompt, ``role`` and ``content``, without the expected answer."""
    decoding: dict[str, Any]
    expected: dict[str, Any]
    """A check, not prose: ``{"type": "exact", "value": …}``."""
    observed: str
    """What the adapter answered."""
    base_answer: str
    base_finished: bool = True
    """Whether the base's answer ended by itself, rather than at the token limit."""
    verdict: Literal["fail"] = "fail"
    since: str
    """The version that first failed it."""
    added: bool = False
    """Whether a person added it, rather than a measurement; measuring again keeps it."""
    found_in: Literal["rows", "probes", "mining"] = "rows"
    """What kind of measurement found it; measuring one kind again keeps the others' cases."""
    rate: FailureRate | None = None
    """How often it fails with sampling; None: greedy."""
    note: str | None = None
    """What that person says of it."""


class LayerError(Frozen):
    """How far the output of one decoder layer is from the reference's."""

    name: str
    """Like ``model.layers.0``."""
    relative_error: Annotated[float, Field(ge=0)]
    """Mean over tokens of ‖candidate − reference‖₂ / ‖reference‖₂, each model fed by its own layers below."""


class FidelityFigures(Frozen):
    """What two models say about the same tokens, each token given all before it in its text."""

    tokens: Annotated[int, Field(ge=1)]
    """Predicted tokens: all but the first of each text."""
    kl_mean: float
    """Mean of KL(reference ‖ candidate) over the vocabulary, nats a token."""
    kl_p99: float
    """99th percentile of it over tokens, nats."""
    top1_agreement: Annotated[float, Field(ge=0, le=1)]
    """Share of tokens for which both find the same token most likely."""
    reference_nll: float
    """Mean negative log-likelihood of the text's own tokens, nats a token."""
    candidate_nll: float
    reference_perplexity: float
    """exp(``reference_nll``)."""
    candidate_perplexity: float
    layers: tuple[LayerError, ...]
    """From the first decoder layer to the last."""


class OtherTarget(Frozen):
    """A target of a merge that was made and measured too, and not kept."""

    onto: Literal["original", "trained"]
    candidate_nll: float
    """On the same texts, nats a token: higher than that of the target that was kept."""
    kl_mean: float


class FidelityEvidence(Frozen):
    """How faithfully this release stands in for a reference."""

    reference: str
    """``name@version`` of a release, a folder's name, or a weighted sum of such names."""
    reference_sha256: Sha256 | None
    """The reference's manifest's; None when it is no release."""
    weights_digest: Sha256
    """Of this release's weight files, as a base digest is made of a base's."""
    text: str
    """The file's name."""
    text_sha256: Sha256
    """Of the file's bytes."""
    texts: Annotated[int, Field(ge=1)]
    """Conversations or windows of plain text that were measured."""
    skipped: Annotated[int, Field(ge=0)] = 0
    """Texts before those that were measured: 4-bit codes may have been chosen on them."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only this many texts were taken, from the first measured on; None: all."""
    figures: FidelityFigures
    delta_survival: float | None = None
    """Share of the adapter's update that is in the weights: Σ⟨W′ − W, s·B·A⟩ / Σ‖s·B·A‖², W being what the
    update was added to. 1: all of it; None: this release was not made from an adapter reference."""
    instead_of: OtherTarget | None = None
    """What was tried beside this, where the target was picked by the likelihood of the text."""
    base_mismatch: BaseMismatch | None = None
    """The base that an adapter was measured on, if it is not the one trained on, and why it was allowed."""
    tools: dict[str, str] = Field(default_factory=dict)
    """Package name to version, of what computed."""
    hardware: Hardware
    seconds: float
    """Wall time of comparing, without loading."""


class RoundingError(Frozen):
    """How far the outputs of one linear layer are from the wanted ones, on the calibration text."""

    name: str
    """The weight's."""
    nearest: Annotated[float, Field(ge=0)]
    """‖(Q − T)·X‖² / ‖T·X‖² with each weight in its nearest code; T·X comes nearest to the wanted outputs."""
    chosen: Annotated[float, Field(ge=0)]
    """The same with the codes that were kept: never more, the nearest where no better were found."""


class RoundingEvidence(Frozen):
    """What choosing 4-bit codes on text gained over rounding to nearest."""

    text: str
    """The file's name."""
    text_sha256: Sha256
    """Of the file's bytes."""
    texts: Annotated[int, Field(ge=1)]
    """Conversations or windows of it that codes were chosen on."""
    tokens: Annotated[int, Field(ge=1)]
    weights: tuple[RoundingError, ...]
    """In the order of the decoder's layers."""


EvidenceT = TypeVar("EvidenceT", bound=Frozen)


def read_evidence(folder: Path, name: str, model: type[EvidenceT]) -> EvidenceT | None:
    """Read one evidence file of a release folder, or None when it was not made ("not measured").

    Raises ManifestError when the file is there but is not what ``model`` describes.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as err:
        key, words = first_problem(err)
        raise ManifestError(f"{path}: {key}: {words}", "make the evidence again") from err


def read_failures(folder: Path) -> tuple[FailureCase, ...] | None:
    """The recorded failure cases of a release folder, or None when none were looked for.

    Raises ManifestError naming the line that is not a failure case.
    """
    path = folder / FAILURES
    return read_cases(path) if path.is_file() else None


def read_cases(path: Path) -> tuple[FailureCase, ...]:
    """The failure cases of a JSONL file. Raises ManifestError naming the line that is not one."""
    cases = []
    # Bytes split at line feeds only; text would also split at U+2028 and the like, which answers may hold.
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            cases.append(FailureCase.model_validate_json(line))
        except ValidationError as err:
            key, words = first_problem(err)
            raise ManifestError(f"{path}, line {number}: {key}: {words}", "make the evidence again") from err
    return tuple(cases)


def to_json(evidence: Frozen) -> bytes:
    """An evidence file's bytes: indented JSON with a newline at the end."""
    return (evidence.model_dump_json(indent=2) + "\n").encode()
