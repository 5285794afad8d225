"""Recommendations of a finished run: for users of the data, for bare histories, and the neighbours of an item.

Letters: B users in the block, T places of a history, V candidates, D width, K places of the answer.
"""

import difflib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmm4rec_cli.data import columns
from mmm4rec_cli.data.dataset import Dataset
from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.device import precision, resolve_device
from mmm4rec_cli.errors import DataError, RunError, UsageError
from mmm4rec_cli.evaluation.evaluate_run import check_finished, run_dataset
from mmm4rec_cli.evaluation.top_k import top_k
from mmm4rec_cli.features.store import ItemFeatures
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.models.recorded import RecordedUsers
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.runs import Run, load_model
from mmm4rec_cli.settings.schema import Settings
from mmm4rec_cli.workspace import Workspace

if TYPE_CHECKING:  # it loads the encoders, which answering does not need
    from mmm4rec_cli.features.new_items import NewItems

SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("rank", pa.int32()),
        (columns.RAW_ITEM_ID, pa.string()),
        ("score", pa.float32()),
        ("text_score", pa.float32()),
        ("image_score", pa.float32()),
    ]
)
"""The columns of a file of recommendations; `rank` counts from 1."""

_CALIBRATED, _TOP = 1000, 10
"""Users whose histories are looked at to raise new items, and the places that these are to get their share of."""
_UNKNOWN_GAP = 3600
"""Seconds between events of a history without times: the gap that the observed time stream takes for "unknown"."""


@dataclass(frozen=True)
class Asked:
    """One who asks: a user of the data, or a bare history.

    Attributes:
        user: raw user id; for a bare history any name, or None.
        history: raw item ids, oldest first; None: the user's own in the data.
        times: Unix seconds of the history, or None where they are not known.
        place: where it was read, for messages.
    """

    user: str | None
    history: Sequence[str] | None = None
    times: Sequence[int] | None = None
    place: str = ""


@dataclass(frozen=True)
class _History:
    user: str | None
    items: NDArray[np.integer[Any]]
    times: NDArray[np.integer[Any]]
    at: int


@dataclass(frozen=True)
class Recommended:
    """The answers of a block; arrays [B, K] on the CPU, `item` 0 where a user has no candidate left."""

    users: list[str | None]
    item: Any
    score: Any
    parts: Mapping[str, Any]


class Recommender:
    """A run's model with its item table, ready to answer.

    Args:
        model: put into evaluation mode here.
        dataset: the catalogue it knows, new items included.
        titles: [V] titles or None, in the order of item ids.
        settings: those of the run.
        device: where it computes.
        candidates: item ids that may be recommended, or None for all.

    Raises:
        ValueError: the model's item table is not finite.
    """

    def __init__(
        self,
        model: SequenceModel,
        dataset: Dataset,
        titles: Sequence[str | None],
        settings: Settings,
        device: torch.device,
        candidates: Iterable[int] | None = None,
    ) -> None:
        self.model = model.eval()
        self.dataset = dataset
        self.settings = settings
        self.device = device
        self._titles = titles
        self._id = {raw: index + 1 for index, raw in enumerate(dataset.raw_item_ids)}
        self._user = {raw: index for index, raw in enumerate(dataset.raw_user_ids)}
        self._raw_V = pa.array(dataset.raw_item_ids, pa.string())
        sequences = dataset.sequences
        self._offsets_U1, self._items_N, self._times_N = (
            x.numpy() for x in (sequences.offsets_U1, sequences.items_N, sequences.times_N)
        )
        self._precision = precision(settings.runtime.precision, device)
        self._users = RecordedUsers(self.model, settings.runtime.precision, device)
        with torch.inference_mode(), self._precision:
            self.item_VD = model.item_table().float()
        if not torch.isfinite(self.item_VD).all():
            raise ValueError("the item table is not finite")
        ids = range(1, len(self.item_VD)) if candidates is None else sorted(set(candidates))
        self.candidate_V = torch.tensor(ids, dtype=torch.int64, device=device)
        self._candidate_VD = self.item_VD[1:] if candidates is None else self.item_VD[self.candidate_V]
        self._offset_V: Tensor | None = None

    def raise_new(self, first_new: int) -> float:
        """Raise the scores of items from `first_new` on by one number, which is given back.

        It is the least that gives them, over the histories before the validation targets (seen items hidden), the
        share of the top ten that they have of the candidates; zero where they have it anyway. No target is read.
        """
        new_V = self.candidate_V >= first_new
        known, new = ((self._candidate_VD[rows], self.candidate_V[rows]) for rows in (~new_V, new_V))
        if not len(known[1]) or not len(new[1]):
            return 0.0
        counts_U = self.dataset.sequences.counts_U
        users = torch.nonzero(counts_U > 2).flatten()
        users = users[torch.linspace(0, len(users) - 1, min(_CALIBRATED, len(users))).round().long()]
        needed = []
        for block in torch.split(users, self.settings.evaluate.batch_size):
            asked = [Asked(self.dataset.raw_user_ids[user]) for user in block.tolist()]
            histories = [self._history(one, 0, "valid") for one in asked]
            user_BD, hidden = self.user_vectors(histories), self._seen(histories)
            with torch.inference_mode():
                known_BK, new_BK = (top_k(user_BD, *rows, _TOP, hidden=hidden)[0] for rows in (known, new))
            # The j-th best new item stands in the top K once it passes the (K - j)-th best known one.
            width = min(known_BK.shape[1], new_BK.shape[1])
            needed.append((known_BK[:, -width:].flip(1) - new_BK[:, :width]).flatten())
        ordered = torch.cat(needed).sort().values
        share = len(new[1]) / len(self.candidate_V)
        places = len(users) * min(_TOP, len(self.candidate_V))
        offset = max(0.0, float(ordered[min(round(share * places), len(ordered) - 1)].nan_to_num(0.0, 0.0, 0.0)))
        self._offset_V = new_V * offset
        return offset

    def title(self, item: int) -> str | None:
        """The title of an item id."""
        return self._titles[item - 1]

    def raw(self, item: int) -> str:
        """The raw id of an item id."""
        return self.dataset.raw_item_ids[item - 1]

    def recommend(
        self,
        asked: Iterable[Asked],
        k: int = 10,
        *,
        include_seen: bool = False,
        at: int | None = None,
        before: Literal["valid", "test"] | None = None,
    ) -> Iterator[Recommended]:
        """The K best items of everyone who asks, `evaluate.batch_size` of them at a time; memory stays bounded.

        Equal scores stand in the order of item ids. A history without times counts with gaps that are unknown.

        Args:
            asked: who asks; taken as needed.
            k: places.
            include_seen: items of the history may be recommended again.
            at: moment of asking, Unix seconds, default now; read only by models whose windows carry the target's time.
            before: `test`: users of the data are answered as before their last element, at its time; `valid`: as
                before their last but one.

        Raises:
            DataError: an unknown user or item (close ones are named), or an empty history.
            UsageError: k below 1.
        """
        if k < 1:
            raise UsageError(f"k = {k}: at least 1", hint="ask for one place or more")
        moment = int(time.time()) if at is None else at
        waiting = iter(asked)
        while block := list(islice(waiting, self.settings.evaluate.batch_size)):
            yield self._answers([self._history(one, moment, before) for one in block], k, include_seen)

    def similar(self, raw: str, k: int = 10) -> Recommended:
        """The K items whose table rows have the highest cosine with that of an item, itself left out.

        Raises:
            DataError: no such item.
        """
        if k < 1:
            raise UsageError(f"k = {k}: at least 1", hint="ask for one place or more")
        item = self._item(raw, "")
        rows = torch.nn.functional.normalize(self._candidate_VD, dim=-1)
        query_1D = torch.nn.functional.normalize(self.item_VD[item : item + 1], dim=-1)
        itself = torch.zeros(1, dtype=torch.int64, device=self.device), torch.tensor([item], device=self.device)
        with torch.inference_mode():
            score_BK, item_BK = top_k(query_1D, rows, self.candidate_V, k, hidden=itself)
            length_BK = self.item_VD[item_BK].norm(dim=-1).clamp(min=1e-12)
            parts = {name: part / length_BK for name, part in self._parts(query_1D, item_BK).items()}
        return _on_cpu([None], item_BK, score_BK, parts)

    def user_vectors(self, histories: Sequence[_History]) -> Tensor:
        """User vectors [B, D] float32 of histories; the last `model.max_len` elements count."""
        length = self.settings.model.max_len
        whole_B = np.array([len(history.items) for history in histories])
        kept_B = np.minimum(whole_B, length)
        place_T = np.arange(length)
        real_BT = place_T < kept_B[:, None]
        flat_BT = np.where(real_BT, (whole_B.cumsum() - kept_B)[:, None] + place_T, 0)
        items = np.where(real_BT, np.concatenate([history.items for history in histories])[flat_BT], 0)
        times = np.where(real_BT, np.concatenate([history.times for history in histories])[flat_BT], 0)
        if self.model.reads_target_time:
            short = np.flatnonzero(kept_B < length)
            times[short, kept_B[short]] = np.array([history.at for history in histories])[short]
        items, times, lengths = items.astype(np.int64), times.astype(np.int64), kept_B.astype(np.int64)
        items_BT, lengths_B, times_BT = (torch.from_numpy(x) for x in (items, lengths, times))
        no_target_B = torch.zeros_like(lengths_B)
        return self._users(Windows(items_BT, lengths_B, times_BT, no_target_B, rows=int(lengths.sum()))).float()

    def _answers(self, histories: list[_History], k: int, include_seen: bool) -> Recommended:
        user_BD = self.user_vectors(histories)
        hidden = None if include_seen else self._seen(histories)
        with torch.inference_mode():
            query_BD, rows_VD = user_BD, self._candidate_VD
            if self._offset_V is not None:  # one more column, times 1
                query_BD = torch.nn.functional.pad(user_BD, (0, 1), value=1.0)
                rows_VD = torch.cat([rows_VD, self._offset_V[:, None]], 1)
            score_BK, item_BK = top_k(query_BD, rows_VD, self.candidate_V, k, hidden=hidden)
            parts = self._parts(user_BD, item_BK)
        return _on_cpu([history.user for history in histories], item_BK, score_BK, parts)

    def _seen(self, histories: Sequence[_History]) -> tuple[Tensor, Tensor]:
        """Pairs of row and item id of all histories."""
        rows = np.repeat(np.arange(len(histories)), [len(history.items) for history in histories])
        items = np.concatenate([history.items for history in histories]).astype(np.int64)
        return torch.from_numpy(rows).to(self.device), torch.from_numpy(items).to(self.device)

    def _parts(self, user_BD: Tensor, item_BK: Tensor) -> dict[str, Tensor]:
        """What each modality adds to the scores of the chosen, [B, K], a few users at a time."""
        chosen: dict[str, list[Tensor]] = {}
        step = max(1, (1 << 24) // max(1, item_BK.shape[1] * user_BD.shape[1]))
        for begin in range(0, len(user_BD), step):
            ids, place_BK = torch.unique(item_BK[begin : begin + step], return_inverse=True)
            with self._precision:
                tables = self.model.item_table_parts(ids)
            for name, table in tables.items():
                part = torch.einsum("bd,bkd->bk", user_BD[begin : begin + step], table.float()[place_BK])
                chosen.setdefault(name, []).append(part)
        return {name: torch.cat(blocks) for name, blocks in chosen.items()}

    def _history(self, one: Asked, moment: int, before: str | None) -> _History:
        where = f"{one.place}: " if one.place else ""
        if one.history is None:
            if one.user is None or one.user not in self._user:
                raise _unknown("user", one.user or "", self.dataset.raw_user_ids, self.dataset.name, where)
            user = self._user[one.user]
            begin, end = int(self._offsets_U1[user]), int(self._offsets_U1[user + 1])
            at = moment
            if before is not None:
                end -= {"test": 1, "valid": 2}[before]
                at = int(self._times_N[end])
            items, times = self._items_N[begin:end], self._times_N[begin:end]
        else:
            at = moment
            items = np.array([self._item(raw, where) for raw in one.history], np.int64)
            times = np.array(one.times or at - _UNKNOWN_GAP * np.arange(len(items), 0, -1), np.int64)
            if len(times) != len(items):
                raise DataError(
                    f"{where}{len(items)} items but {len(times)} times", hint="give every item of a history its time"
                )
            if (np.diff(times) < 0).any():
                raise DataError(f"{where}the times of the history go back", hint="give the oldest item first")
        if not len(items):
            raise DataError(
                f"{where}the history{f' of {one.user!r}' if one.user else ''} is empty",
                hint="a history needs one item or more",
            )
        return _History(one.user, items, times, at)

    def _item(self, raw: str, where: str) -> int:
        if raw not in self._id:
            raise _unknown("item", raw, self.dataset.raw_item_ids, self.dataset.name, where)
        return self._id[raw]

    def table(self, found: Recommended) -> pa.Table:
        """A block's answers with the columns of `SCHEMA`."""
        real = found.item > 0
        row, place = np.nonzero(real)
        item = found.item[real]
        nothing = pa.nulls(len(item), pa.float32())
        parts = {name: pa.array(found.parts[name][real]) if name in found.parts else nothing for name in _PARTS}
        arrays = [pa.array(found.users, pa.string()).take(pa.array(row)), pa.array(place + 1, pa.int32())]
        return pa.table(
            [*arrays, self._raw_V.take(pa.array(item - 1)), found.score[real], *parts.values()], schema=SCHEMA
        )

    def documents(self, found: Recommended) -> list[dict[str, Any]]:
        """A block's answers as `recommend --json` gives them, one entry a user."""
        made = []
        for row, user in enumerate(found.users):
            items = []
            for place in np.flatnonzero(found.item[row]).tolist():
                item = int(found.item[row, place])
                scores = {
                    f"{name}_score": float(found.parts[name][row, place]) if name in found.parts else None
                    for name in _PARTS
                }
                items.append(
                    {
                        columns.RAW_ITEM_ID: self.raw(item),
                        "score": float(found.score[row, place]),
                        columns.TITLE: self.title(item),
                        **scores,
                    }
                )
            made.append({"user": user, "items": items})
        return made


_PARTS = ("text", "image")


def _on_cpu(users: list[str | None], item: Tensor, score: Tensor, parts: Mapping[str, Tensor]) -> Recommended:
    item = torch.where(torch.isneginf(score), 0, item)
    return Recommended(
        users, item.cpu().numpy(), score.cpu().numpy(), {name: part.cpu().numpy() for name, part in parts.items()}
    )


def _unknown(kind: str, raw: str, known: Sequence[str], where: str, place: str) -> DataError:
    """The error for an id that nobody has, with the ones that look like it."""
    # Comparing with a million ids takes minutes: those that start alike come first, and a part of the rest.
    alike = [one for one in known if one[:2] == raw[:2]]
    close = difflib.get_close_matches(raw, (alike or known)[:20_000], n=3)
    hint = f"close to it: {', '.join(close)}" if close else f"for example {', '.join(known[:3])}"
    return DataError(f"{place}{kind} {raw!r} is not in {where}", hint=hint)


def load_recommender(
    workspace: Workspace,
    run: Run,
    settings: Settings,
    *,
    new_items: "NewItems | None" = None,
    candidates: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Recommender:
    """Bring a run's model back on the present tables; of several seeds the first.

    Args:
        workspace: where data lie.
        run: a finished run.
        settings: the run's, with `evaluate` and `runtime` of the invocation.
        new_items: items never trained on (`mmm4rec_cli.features.new_items`): they are ranked with the known ones,
            their item bias is zero, and `evaluate.new_items` says whether their scores are raised.
        candidates: raw ids that may be recommended, default all.
        exclude: raw ids that may not.
        reporter: told what changed since the run.

    Raises:
        DataError: a candidate that nobody knows, none left, or new items that are known already or of other vectors.
        RunError: the run is unfinished, damaged, of a removed domain, or does not fit the present tables.
    """
    check_finished(run)
    reporter = reporter or SilentReporter()
    dataset = run_dataset(workspace, run)
    titles = _titles(workspace, dataset)
    if new_items is not None:
        known = len(dataset.raw_item_ids)
        dataset = with_new_items(dataset, new_items, settings.features.missing)
        titles += new_items.titles
        reporter.note(f"{len(dataset.raw_item_ids) - known:,} new items are ranked with the {known:,} known ones")
    chosen = _chosen(dataset, candidates, exclude, reporter)
    device = resolve_device(settings.runtime.device)
    member = run.members[0]
    if len(run.members) > 1:
        reporter.note(f"run {run.id} has {len(run.members)} seeds: {member.id} answers")
    model, moved = load_model(member, dataset, device)
    trained = () if new_items is None else model.state_dict()
    if "items.weight" in trained:
        reporter.note(
            f"{run.about['model']} has a trained vector for every known item; a new item's is zero, so that its text "
            "and picture alone speak for it, if this model reads them"
        )
    elif "text.item_bias" in trained:
        reporter.note("new items have no trained item bias: theirs is zero, which may place them lower")
    new = moved.new - (0 if new_items is None else len(new_items.raw_ids))
    if new or moved.gone:
        reporter.note(
            f"the catalogue has changed since run {member.id}: {moved.kept:,} items kept, {new:,} new "
            f"(item bias zero), {moved.gone:,} gone"
        )
    try:
        made = Recommender(model, dataset, titles, settings, device, chosen)
        if new_items is not None and settings.evaluate.new_items == "fair_share":
            offset = made.raise_new(len(dataset.raw_item_ids) - len(new_items.raw_ids) + 1)
            reporter.note(
                f"evaluate.new_items = fair_share: the scores of new items are raised by {offset:.3f}, which is in "
                "neither their text nor their image part"
            )
    except ValueError as error:
        raise RunError(f"run {member.id}: {error}", hint="the run is damaged; train again") from None
    return made


def _titles(workspace: Workspace, dataset: Dataset) -> list[str | None]:
    titles: list[str | None] = []
    for domain in dataset.domains:
        path = workspace.processed(domain) / "items.parquet"
        titles += pq.read_table(path, columns=[columns.TITLE])[columns.TITLE].to_pylist()
    return titles


def with_new_items(dataset: Dataset, new: "NewItems", missing: str) -> Dataset:
    """The data set with items behind its own, which keep their ids and their vectors.

    Args:
        dataset: the known.
        new: of the same encoder.
        missing: `features.missing` of the run; a mean is taken over the known vectors alone.

    Raises:
        DataError: an id that is known already, or vectors of another encoder or width.
    """
    known = set(dataset.raw_item_ids)
    if again := [raw for raw in new.raw_ids if raw in known]:
        raise DataError(
            f"{len(again)} of the new items are in {dataset.name} already: {', '.join(again[:5])}",
            hint="leave them out: known items are ranked anyway",
        )
    have = dataset.features
    if new.fingerprint != have.fingerprint:
        raise DataError(
            f"the new items' vectors are of another encoder ({new.fingerprint[:8]}) than the run's "
            f"({have.fingerprint[:8]})",
            hint="encode them with the run's own encoder",
        )
    filled = dataset.model_features(missing)
    own = {"text": filled.text.numpy(), "image": filled.image.numpy()}
    tables, masks = {}, {}
    for name, (vectors, present) in {"text": new.text, "image": new.image}.items():
        had = getattr(have, f"has_{name}")
        if not present.any():
            vectors = np.zeros((len(present), own[name].shape[1]), np.float32)
        if vectors.shape[1] != own[name].shape[1]:
            raise DataError(
                f"the new items' {name} vectors are {vectors.shape[1]} wide, those of {dataset.name} "
                f"{own[name].shape[1]}",
                hint="encode them with the run's own encoder",
            )
        if missing == "mean" and had.any():
            stand_in = getattr(have, name)[had].mean(0, dtype=np.float64)
            vectors = np.where(present[:, None], vectors, stand_in)
            had, present = np.arange(len(had)) > 0, np.ones_like(present)
        tables[name] = np.concatenate([own[name], vectors]).astype(np.float32)
        masks[name] = np.concatenate([had, present])
    features = ItemFeatures(
        tables["text"], masks["text"], tables["image"], masks["image"], have.metadata, have.fingerprint
    )
    return replace(dataset, raw_item_ids=[*dataset.raw_item_ids, *new.raw_ids], features=features)


def _chosen(
    dataset: Dataset, candidates: Sequence[str] | None, exclude: Sequence[str], reporter: Reporter
) -> list[int] | None:
    """Item ids that may be recommended, None for all."""
    if candidates is None and not exclude:
        return None
    ids = {raw: index + 1 for index, raw in enumerate(dataset.raw_item_ids)}
    if unknown := [raw for raw in candidates or () if raw not in ids]:
        raise _unknown("candidate", unknown[0], dataset.raw_item_ids, dataset.name, "")
    if strangers := sum(raw not in ids for raw in exclude):
        reporter.warn(f"{strangers:,} of the {len(exclude):,} ids to exclude are not in {dataset.name}")
    left = set(ids if candidates is None else candidates) - set(exclude)
    if not left:
        raise DataError("no candidate is left", hint="see --candidates and --exclude")
    return [ids[raw] for raw in left]


def parse_moment(text: str) -> int:
    """Unix seconds of a moment written as such or as an ISO date; without a zone it is UTC.

    Raises:
        UsageError: neither.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is no moment", hint="give Unix seconds or an ISO date, 2018-10-01T12:00") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
