"""The settings: every knob of the tool, with its unit, its range and its default.

Defaults are the paper's (arXiv 2506.02916, published configurations). Models are frozen and closed: an unknown key is
an error. Where a value comes from, and in which order sources win, is in `mmm4rec_cli.settings.load`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mmm4rec_cli.settings.presets import PROTOCOLS, merged


def _split(value: Any) -> Any:
    """Take "10,20,50" for a list, as everywhere on the command line, and 10 for a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _none_if_empty(value: Any) -> Any:
    """Take an empty text for none, because TOML and the environment have no other word for it."""
    return None if value == "" else value


Probability = Annotated[float, Field(ge=0, lt=1)]
OptionalText = Annotated[str | None, BeforeValidator(_none_if_empty)]
Addresses = Annotated[tuple[Annotated[str, Field(pattern=r"^https?://")], ...], BeforeValidator(_split)]
Cutoffs = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split), Field(min_length=1)]


class Section(BaseModel):
    """A frozen, closed section of the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Columns(Section):
    """Names of the columns in a user's own tables."""

    user_id: str = Field("user_id", min_length=1, description="column with the user's id")
    item_id: str = Field("item_id", min_length=1, description="column with the item's id, in both tables")
    timestamp: str = Field("timestamp", min_length=1, description="column with the time of the interaction")
    text: str = Field("text", min_length=1, description="column with the item's text")
    title: str = Field("title", min_length=1, description="column with the item's title")
    brand: str = Field("brand", min_length=1, description="column with the item's brand")
    description: str = Field("description", min_length=1, description="column with the item's description")
    image: str = Field("image", min_length=1, description="column with the path of the item's picture")
    categories: str = Field(
        "categories", min_length=1, description="column with the item's categories: a list, or a text parted by |"
    )


class DataSettings(Section):
    """From raw files to interactions."""

    min_user: int = Field(5, ge=1, description="k-core: interactions a user must have")
    min_item: int = Field(5, ge=1, description="k-core: interactions an item must have")
    split: Literal["leave_one_out", "temporal"] = Field(
        "leave_one_out",
        description="targets held out: each user's last two, or each user's first after two moments in time",
    )
    split_share: float = Field(
        0.1, gt=0, lt=0.5, description="temporal split: share of the interactions after each of the two moments"
    )
    require_image: bool = Field(False, description="keep only items that name an image")
    require_text: bool = Field(False, description="keep only items that have usable text")
    timestamp_unit: Literal["auto", "s", "ms", "iso"] = Field(
        "auto", description="unit of a user's own time stamps: seconds, milliseconds, ISO 8601, or found out and said"
    )
    image_timeout: float = Field(20.0, gt=0, description="seconds to wait for one picture")
    image_workers: int = Field(32, ge=1, le=256, description="pictures fetched at the same time")
    image_per_host: int = Field(8, ge=1, le=256, description="pictures fetched at the same time from one host")
    mirrors: Addresses = Field((), description="addresses of mirrors, tried in this order before the known ones")
    download_workers: int = Field(4, ge=1, le=64, description="files fetched at the same time")
    download_attempts: int = Field(
        6, ge=1, description="attempts in a row that bring nothing new until an address is given up"
    )
    download_wait: float = Field(
        1.0, ge=0, description="seconds before the second attempt; doubled from attempt to attempt, up to a minute"
    )
    download_timeout: float = Field(60.0, gt=0, description="seconds without a byte until a connection is given up")
    download_rate: int = Field(
        1000, ge=0, description="bytes a second that must come on the average of download_timeout seconds"
    )
    columns: Columns = Field(default_factory=Columns, description="names of the columns in a user's own tables")


class FeatureSettings(Section):
    """From texts and images to vectors."""

    encoder: str = Field(
        "siglip", min_length=1, description="encoder whose vectors are used; also the name of the features file"
    )
    text_model: OptionalText = Field(
        None, description="Hugging Face id or folder of the text model, else the encoder's"
    )
    image_model: OptionalText = Field(
        None, description="Hugging Face id or folder of the image model, else the encoder's"
    )
    text_pooling: Literal["auto", "pooled", "mean", "cls"] = Field(
        "auto",
        description="for a text model of its own: its pooled output, the mean over its tokens, its first token, or "
        "(auto) what a sentence-transformers model says of itself, else pooled where that was trained, else the mean",
    )
    max_text_length: int = Field(64, ge=4, description="tokens a text is cut or padded to")
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="texts or images encoded at once; auto suits the device, and both are halved when memory runs out",
    )
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32", description="the encoder's arithmetic: IEEE float32, TF32 products on the GPU, or bfloat16"
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = Field(
        "auto",
        description="processes that decode, resize and tokenise; 0: threads alone; auto: one a core where many wait",
    )
    part_size: int = Field(
        8192, ge=1, description="texts or images in one part file, from which an interrupted run goes on"
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="number format of the stored vectors")
    fallback: Literal["null", "published"] = Field(
        "null", description="an item without text or image: no vector, or the published stand-in (item id, white image)"
    )
    missing: Literal["zero", "mean", "learned"] = Field(
        "mean", description="what the model sees for a missing vector: zeros, the mean of the others, a trained vector"
    )


class BaselineSettings(Section):
    """What only baselines (`finetune --model`) have; sizes that they share with MMM4Rec are in `model` itself."""

    heads: int = Field(2, ge=1, description="attention heads; must divide hidden_size")
    attention_dropout: Probability = Field(0.4, description="dropout on attention weights")
    low_bins: int = Field(2, ge=1, description="bsarec: Fourier bins, from the lowest on, that count as low")
    filter_share: float = Field(0.9, ge=0, le=1, description="bsarec: share of the filter, the rest is attention")
    experts: int = Field(4, ge=1, description="experts of a mixture (hm4sr, athwe, unisrec)")
    experts_used: int = Field(6, ge=1, description="athwe: experts that a place is routed to")
    clusters: int = Field(100, ge=2, description="athwe: clusters of items that the cluster loss tells apart")
    mask_share: float = Field(
        0.3, ge=0, lt=1, description="share of a history's places that the time contrast masks (hm4sr, athwe)"
    )
    id_temperature: float = Field(0.2, gt=0, description="temperature of the contrast of id vectors (hm4sr, athwe)")
    overwrite_features: bool = Field(
        False, description="protocol: text and image vectors are replaced by noise (published Q25: m3rec, hm4sr)"
    )
    mamba_start: Literal["kept", "redrawn"] = Field(
        "kept", description="protocol: start of Mamba-1 blocks: their own, or that of all linear maps (published Q28)"
    )
    filter_padding: bool = Field(
        False, description="protocol: filters over places run over padding too (published: bsarec, athwe)"
    )
    mask_nothing: bool = Field(False, description="protocol: the time contrast masks no place (published Q27: athwe)")
    empty_categories: bool = Field(
        False, description="protocol: category targets have no column and training stops (published Q24: hm4sr, athwe)"
    )


class ModelSettings(Section):
    """The network (paper section 4; sizes as published)."""

    hidden_size: int = Field(256, ge=1, description="width of the model")
    inner_size: int = Field(256, ge=1, description="width inside the feed-forward block")
    num_layers: int = Field(1, ge=1, description="encoder layers, and as many decoder layers")
    d_state: int = Field(64, ge=1, description="state size of the SSD")
    n_groups: int = Field(8, ge=1, description="groups of B and C; must divide the number of heads")
    d_conv: int = Field(4, ge=2, le=4, description="taps of the causal convolutions")
    expand: int = Field(2, ge=1, description="width of the state-space branch over hidden_size")
    head_dim: int = Field(64, ge=1, description="channels a head; must divide expand * hidden_size")
    max_len: int = Field(20, ge=2, description="places of a sequence; weights are bound to it")
    item_bias: bool = Field(True, description='a trained vector an item and modality (the paper\'s "with ID")')
    fusion: Literal["static", "shared", "instance"] = Field(
        "static", description="text and image scores: sum, two shared trained weights, two trained weights an item"
    )
    time: Literal["observed", "published", "none", "buckets", "decay"] = Field(
        "none",
        description="how gaps between events enter: not at all; observed: time streams of the gaps between observed "
        "events; published: time streams as published, which read the target's own time; buckets: a trained vector a "
        "range of gaps, added to the items; decay: each head's step size times a trained power of the gap",
    )
    feature_scale: Literal["none", "unit", "standard"] = Field(
        "none",
        description="item vectors before the adapter: as they are, at length 1, or every column at mean 0 and "
        "deviation 1 over the items",
    )
    feed_forward: bool = Field(True, description="feed-forward block after each SSD block")
    point_time_gate: bool = Field(False, description="time gate a place instead of one a sequence")
    temperature: float = Field(0.8, gt=0, description="scores are divided by it")
    dropout: Probability = Field(0.4, description="dropout behind the blocks")
    embedding_dropout: Probability = Field(0.4, description="dropout on item vectors")
    time_dropout: Probability = Field(0.4, description="dropout on time streams")
    norm_eps: float = Field(1e-12, gt=0, description="added to variances inside the root")
    padding_candidate: bool = Field(
        False, description="protocol: padding row 0 is a candidate in loss and ranking (published)"
    )
    mask_duplicate_labels: bool = Field(
        True, description="protocol: in-batch loss hides other rows with the same label (published: counts them wrong)"
    )
    baseline: BaselineSettings = Field(default_factory=BaselineSettings, description="what only baselines have")

    @property
    def n_heads(self) -> int:
        """Heads of the SSD."""
        return self.expand * self.hidden_size // self.head_dim

    @property
    def has_time_streams(self) -> bool:
        """Whether gaps run through the layers as streams of their own (paper section 4)."""
        return self.time in ("observed", "published")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        inner = self.expand * self.hidden_size
        if inner % self.head_dim:
            raise ValueError(f"head_dim={self.head_dim} must divide expand * hidden_size = {inner}")
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_groups={self.n_groups} must divide the number of heads, {self.n_heads}")
        return self


class Optimisation(Section):
    """What both ways of training share: coupled weight decay, gradients accumulated."""

    epochs: int = Field(100, ge=1, description="passes over the training targets, at most")
    optimizer: Literal["nadam", "adam"] = Field("nadam", description="NAdam, or Adam as the published baselines")
    lr: float = Field(1e-4, gt=0, description="learning rate")
    lr_decay: float = Field(1.0, gt=0, le=1, description="the learning rate is multiplied by it after every epoch")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="the learning rate stays, or falls to 0 over `epochs` along half a cosine or a line"
    )
    warmup: float = Field(0.0, ge=0, description="epochs over which the learning rate rises from 0 to `lr`")
    weight_decay: float = Field(0.005, ge=0, description="L2 added to the gradient")
    decayed: Literal["all", "matrices"] = Field(
        "all",
        description="what weight decay acts on: everything (as published), or matrices and taps, not item biases, "
        "other biases, norms and the numbers of the scan",
    )
    average: Probability = Field(
        0.0,
        description="what an exponential mean of the weights over the steps keeps at a step; the mean is then "
        "validated and kept in their place; 0: no mean",
    )
    momentum_decay: float = Field(0.004, ge=0, description="NAdam's momentum decay")
    batch_size: int = Field(1024, ge=1, description="targets a micro-batch")
    accumulation: int = Field(8, ge=1, description="micro-batches an optimiser step")
    shuffle: bool = Field(True, description="targets in a new random order every epoch, or always by user and time")
    prefixes: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        "all", description="targets of a user in an epoch: all, or a number that is drawn anew every epoch"
    )
    mean_over_group: bool = Field(
        True, description="protocol: mean loss over the accumulation group (published: a sum of micro-batch means)"
    )
    stop_on_nonfinite: bool = Field(
        True, description="protocol: a loss that is NaN or infinite stops the run (published: goes on)"
    )


class PretrainSettings(Optimisation):
    """Pre-training on many domains, in-batch loss."""

    lr: float = Field(2.5e-4, gt=0, description="learning rate")
    loss: Literal["in_batch", "full"] = Field(
        "in_batch", description="softmax over the labels of the micro-batch, or over the whole catalogue"
    )
    save_every: int = Field(5, ge=1, description="epochs between kept copies of the weights")
    seeded: bool = Field(True, description="protocol: runtime.seed is set before pre-training (published: not)")


class FinetuneSettings(Optimisation):
    """Fine-tuning on one domain, full softmax."""

    loss: Literal["full", "sampled", "in_batch"] = Field(
        "full",
        description="softmax over the whole catalogue; sampled, for millions of items: an estimate of it from uniform "
        "and in-batch negatives, where rows of the item bias that do not occur in a step are left as they are "
        "(optimiser state and weight decay included: another optimiser than that of the full loss); over the labels "
        "of the micro-batch",
    )
    negatives: int = Field(
        4096, ge=1, description="sampled loss: items drawn uniformly for each micro-batch, beside its labels"
    )
    transfer: Literal["all", "adapters", "blocks"] = Field(
        "all",
        description="what is taken from pre-trained weights: all that is not bound to an item; the adapters and their "
        "norms; all but these",
    )
    frozen_epochs: int = Field(
        0, ge=0, description="first epochs in which the adapters keep the values that were taken over"
    )
    patience: int = Field(10, ge=1, description="epochs below the best validation score until the run stops")
    metric: str = Field(
        "NDCG@10", pattern=r"^(Hit|NDCG)@[1-9][0-9]*$|^MRR$", description="validation metric that chooses the epoch"
    )
    shuffle_validation: bool = Field(
        False, description="protocol: validation order is drawn from the training's random stream (published)"
    )

    @model_validator(mode="after")
    def _averages_all(self) -> Self:
        if self.average and self.loss == "sampled":
            raise ValueError("average must be 0 with loss = sampled, whose item biases have no mean over the steps")
        return self


class EvaluateSettings(Section):
    """Ranking the whole catalogue."""

    k: Cutoffs = Field((10, 20, 50), description="cut-offs of Hit@K and NDCG@K")
    ties: Literal["half", "optimistic", "pessimistic"] = Field(
        "half", description="a candidate with the target's score counts as half above, below, or above it"
    )
    batch_size: int = Field(1024, ge=1, description="users encoded at once")
    new_items: Literal["as_scored", "fair_share"] = Field(
        "as_scored",
        description="recommend --new-items: ranked as scored, or all raised by one number, fitted on validation "
        "histories, so that their share of the top ten is at least their share of the catalogue",
    )


class RuntimeSettings(Section):
    """The machine."""

    seed: int = Field(2020, ge=0, lt=2**32, description="seed of all randomness")
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda or cuda:N")
    precision: Literal["tf32", "fp32", "bf16"] = Field(
        "tf32", description="matrix products on the GPU: TF32 (as published), IEEE float32, bfloat16 autocast"
    )
    cuda_graphs: bool = Field(True, description="record training steps on the GPU once and replay them")
    shard_items: Literal["auto", "always", "never"] = Field(
        "auto",
        description="full loss with several processes: each encodes and scores a slice of the items, never the whole; "
        "auto: where eight copies of the item table take more than half of the GPU's memory",
    )
    save_minutes: float = Field(
        10.0, gt=0, description="minutes between two savings inside an epoch, from which a killed training goes on"
    )


class Settings(Section):
    """All settings of one invocation."""

    protocol: Literal["corrected", "published"] = Field(
        "corrected", description="a preset over the fields marked `protocol`: the paper's code as it runs, or mended"
    )
    data: DataSettings = Field(default_factory=DataSettings, description="from raw files to interactions")
    features: FeatureSettings = Field(default_factory=FeatureSettings, description="from texts and images to vectors")
    model: ModelSettings = Field(default_factory=ModelSettings, description="the network")
    pretrain: PretrainSettings = Field(default_factory=PretrainSettings, description="pre-training")
    finetune: FinetuneSettings = Field(default_factory=FinetuneSettings, description="fine-tuning")
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="ranking")
    runtime: RuntimeSettings = Field(default_factory=RuntimeSettings, description="the machine")

    @model_validator(mode="before")
    @classmethod
    def _resolve_protocol(cls, values: Any) -> Any:
        """Lay the protocol's preset under what was given, so that no module below asks for the protocol."""
        if not isinstance(values, dict):
            return values
        preset = PROTOCOLS.get(values.get("protocol", "corrected"))
        return values if preset is None else merged(preset, values)
