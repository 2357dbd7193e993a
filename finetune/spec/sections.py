"""The sections of a job spec, with the type, the bounds and the default of each field. Torch-free."""

from __future__ import annotations

import codecs
import re
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from finetune.spec.backbones import DEFAULT_BACKBONE, HUB_NAME, ON_HUB, is_own_model, is_registered_model
from finetune.spec.tasks import LOSS_MEANINGS, LossName

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
SUFFIX_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class Section(BaseModel):
    """A section of a spec: unknown keys are errors, and values are immutable after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    HINT: ClassVar[str] = ""  # appended to the allowed keys in the error for an unknown key


class HeadSpec(Section):
    """The head on top of the backbone: pooling over positions, dropout, one linear layer."""

    pooling: Annotated[
        Literal["avg", "max", "avgmax", "gem"],
        Field(
            description="How the feature map is reduced to one vector per image: global average pooling (avg), global max "
            "pooling, the mean of both (avgmax), or generalised mean with exponent 3 (gem). Class activation maps are exact "
            "with avg."
        ),
    ] = "avg"
    dropout: Annotated[
        Auto | Fraction,
        Field(description="Dropout rate between pooling and the linear layer, in training by steps; a solved head has none."),
    ] = "auto"
    aux: Annotated[
        bool | str | None,
        Field(
            description="Train an auxiliary classifier on an intermediate stage, as in Inception, and drop it at export: true "
            "for the last stage but one, or the name of a stage. For methods that train by steps."
        ),
    ] = None


class ModelSpec(Section):
    """The pretrained backbone, the source of its weights, and the head."""

    backbone: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1000,
            description="The pretrained network: a timm name such as resnet50, local-dir:FOLDER, hf-hub:OWNER/NAME, or a model "
            "of your own as name@version or as the folder of a run.",
        ),
    ] = DEFAULT_BACKBONE
    weights: Annotated[
        str,
        Field(
            description="Where the initial weights come from: package (installed with finetune), hub (downloaded from timm's "
            "hub), auto (package if it has them, else hub), none (random initialisation), or the path of a .pth or .safetensors "
            "file."
        ),
    ] = "auto"
    input_size_px: Annotated[
        Auto | Annotated[int, Field(ge=32, le=1024)],
        Field(description="Side of the square input images in pixels. auto: the size that the weights were trained with."),
    ] = "auto"
    head: Annotated[HeadSpec, Field(description="The head: pooling, dropout and one linear layer.")] = HeadSpec()

    @field_validator("backbone")
    @classmethod
    def _is_a_name_that_the_hub_can_have(cls, backbone: str) -> str:
        if backbone.startswith(ON_HUB) and not re.fullmatch(HUB_NAME, backbone.removeprefix(ON_HUB)):
            raise ValueError(f"{backbone[:200]!r} is not of the form hf-hub:OWNER/NAME, as in hf-hub:timm/resnet18.a1_in1k")
        return backbone

    @model_validator(mode="after")
    def _own_models_bring_their_weights(self) -> ModelSpec:
        if not is_own_model(self.backbone):
            return self
        if self.weights != "auto":
            raise ValueError(f"{self.backbone} brings its own weights: leave model.weights at auto")
        if "@" in self.backbone and "/" not in self.backbone and not is_registered_model(self.backbone):
            raise ValueError(
                f"{self.backbone!r}: give a registered model with the number of its version, as in flowers@3; what an alias "
                "means can change while a job waits"
            )
        return self


Column = Annotated[str | None, Field(min_length=1, max_length=1000)]


_NOT_OF_NAMES = ("idna", "punycode", "unicode-escape", "raw-unicode-escape")  # of text, but of no file system


def _is_encoding_of_names(given: str) -> str:
    if given == "auto":
        return given
    try:
        b"name".decode(given)  # a LookupError also for codecs that are not of text, such as rot13
        is_known = codecs.lookup(given).name not in _NOT_OF_NAMES
    except (LookupError, ValueError):
        is_known = False
    if not is_known:
        raise ValueError(f"{given!r} is no encoding of file names; try utf-8, cp437, cp932, gbk or cp1252")
    return given


def _no_empty_separator(given: Any) -> Any:
    """Refuse what YAML makes of a separator without quotes: ``label_separator: |`` begins a text there, which is empty."""
    if given == "":
        raise ValueError("an empty text separates nothing; in a YAML file, put the separator into quotes: label_separator: '|'")
    return given


class DataSpec(Section):
    """How the labelled images are read and split."""

    val_fraction: Annotated[
        float, Field(gt=0.0, lt=0.9, description="Share of the images to validate on, if no validation images are given.")
    ] = 0.15
    test_fraction: Annotated[
        Auto | Fraction,
        Field(
            description="Share of the images to test on, if no test images are given. auto: 0.15, or 0 with data.folds, which "
            "tests on every image."
        ),
    ] = "auto"
    split_seed: Annotated[
        int,
        Field(
            ge=0,
            lt=2**32,
            description="Seed of the split into train, val and test. The seed of training does not change the split, so that "
            "runs with different seeds are compared on the same images.",
        ),
    ] = 0
    split_file: Annotated[
        str | None,
        Field(
            min_length=1,
            description="The split.csv of an earlier run: its images stay in the same split, and only new images are drawn.",
        ),
    ] = None
    revision: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9a-f]{8,64}$",
            description="The revision of the data that is expected, as finetune data show prints it; other data is refused.",
        ),
    ] = None
    manifest: Annotated[
        str | None,
        Field(
            min_length=1,
            description="A CSV file of corrections, written by finetune check --fix: labels, groups, and images to leave out.",
        ),
    ] = None
    file_column: Annotated[Column, Field(description="The column of a table that names the image files. null: detected.")] = None
    label_column: Annotated[Column, Field(description="The column of a table with the labels. null: detected.")] = None
    split_column: Annotated[
        Column, Field(description="The column of a table that says train, val or test. null: detected, if there is one.")
    ] = None
    group_column: Annotated[
        Column,
        Field(
            description="The column of a table with the group of an image, such as a patient: images of one group are never in "
            "two splits or folds."
        ),
    ] = None
    weight_column: Annotated[
        Column,
        Field(
            description="The column of a table with the weight of an image in the training loss, 0 or more. Metrics count every "
            "image once."
        ),
    ] = None
    label_separator: Annotated[
        str | None,
        Field(min_length=1, max_length=8, description="The text between several labels in one cell of a table, such as |."),
    ] = None
    _separates = field_validator("label_separator", mode="before")(_no_empty_separator)
    splits: Annotated[
        dict[str, Literal["train", "val", "test", "none", "class"]],
        Field(
            max_length=1000,
            description="What the names of folders, or the values of the split column, mean, as in {dev_set: val, extra: none}: "
            "train, val, test, none (left out) or class (a class of that name).",
        ),
    ] = Field(default_factory=dict)
    class_folder: Annotated[
        Literal["auto", "first", "last"],
        Field(description="Which of nested folders names the class: first is the outermost, last the innermost."),
    ] = "auto"
    name_encoding: Annotated[
        str,
        Field(
            max_length=40,
            description="Encoding of the file names in archives that do not state it, such as cp437, cp932 or gbk. auto: "
            "detected.",
        ),
    ] = "auto"
    _encodes = field_validator("name_encoding")(_is_encoding_of_names)
    within: Annotated[
        tuple[str, ...] | None,
        Field(description="The only folders that links and tables may point into. A server sets this for its jobs."),
    ] = None
    class_weights: Annotated[
        Literal["none", "balanced", "effective_number", "sampling"],
        Field(
            description="Weight of an image in the training loss by the size of its class: balanced is one over the number of "
            "images of the class, effective_number is less steep, sampling draws every class equally often."
        ),
    ] = "none"
    logit_adjustment: Annotated[
        float,
        Field(
            ge=0.0,
            le=2.0,
            description="Strength of logit adjustment for classes of different size: 1 optimises the mean recall over classes, "
            "0 switches it off. An alternative to class_weights.",
        ),
    ] = 0.0
    on_bad_image: Annotated[
        Literal["quarantine", "fail"],
        Field(description="What to do with an image that cannot be read: leave it out and report it (quarantine), or fail."),
    ] = "quarantine"
    max_bad_fraction: Annotated[Fraction, Field(description="Fail if a larger share of the images than this cannot be read.")] = (
        0.05
    )
    resize: Annotated[
        Literal["auto", "crop", "squash", "letterbox"],
        Field(
            description="How an image becomes a square: crop its centre, squash it (change its aspect ratio), or letterbox it "
            "(add borders). auto: chosen by the shapes of the images."
        ),
    ] = "auto"
    folds: Annotated[
        Annotated[int, Field(ge=2, le=50)] | None,
        Field(
            description="Cross-validate with this number of folds, each tested on other images, then train on all images. null: "
            "one split."
        ),
    ] = None

    @model_validator(mode="after")
    def _balances_once(self) -> DataSpec:
        if self.class_weights != "none" and self.logit_adjustment > 0:
            raise ValueError("give either class_weights or logit_adjustment: both make up for the classes' sizes")
        return self

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> DataSpec:
        if self.val_fraction + self.held_out_fraction >= 0.9:
            raise ValueError(
                f"val_fraction {self.val_fraction} + test_fraction {self.held_out_fraction} leaves under a tenth to train on"
            )
        return self

    @property
    def held_out_fraction(self) -> float:
        """The share of images that is split off for testing if no test images are given."""
        if self.test_fraction != "auto":
            return self.test_fraction
        return 0.15 if self.folds is None else 0.0


BatchNormPolicy = Annotated[
    Literal["frozen", "train", "recalibrate"],
    Field(
        description="Batch normalisation in the stages that train: frozen keeps the running statistics of the pretrained "
        "weights, train updates them at every step, recalibrate estimates them once at the end."
    ),
]
WarmHead = Annotated[
    bool,
    Field(description="Solve the head on frozen features before the first step, so that early steps do not harm the backbone."),
]
LayerDecay = Annotated[
    Auto | Annotated[float, Field(gt=0.0, le=1.0)],
    Field(description="Ratio of the learning rate of a stage to that of the stage above it. 1: the same for all stages."),
]
MethodType = Field(description="The method: which part of the network trains.")


class LinearProbe(Section):
    """Freeze the whole backbone and fit only the linear head on its features."""

    type: Annotated[Literal["linear_probe"], MethodType] = "linear_probe"


class Partial(Section):
    """Train the head and the last stages: `stages` counts them from the top (default 1), `train` names them."""

    type: Annotated[Literal["partial"], MethodType] = "partial"
    stages: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="How many stages train, counted from the top. null: 1, unless train names them."),
    ] = None
    train: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1)] | None,
        Field(description="The stages that train, by name, as finetune backbones NAME lists them: [layer3, layer4]."),
    ] = None
    warm_head: WarmHead = True
    bn: BatchNormPolicy = "frozen"

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Partial:
        if self.stages is not None and self.train is not None:
            raise ValueError("give either stages (a number from the top) or train (a list of stage names), not both")
        return self


class Full(Section):
    """Train all stages. `warm_head` fits the head on frozen features first (LP-FT, Kumar et al. 2022, arXiv:2202.10054)."""

    type: Annotated[Literal["full"], MethodType] = "full"
    warm_head: WarmHead = True
    layer_decay: LayerDecay = "auto"
    bn: BatchNormPolicy = "frozen"


class Gradual(Section):
    """Unfreeze stage by stage from the top, one phase each (ULMFiT, Howard & Ruder 2018, arXiv:1801.06146)."""

    type: Annotated[Literal["gradual"], MethodType] = "gradual"
    warm_head: WarmHead = True
    epochs_per_stage: Annotated[
        Auto | Annotated[int, Field(ge=1)],
        Field(description="Epochs between unfreezing one stage and the next. auto: n_epochs divided by the number of stages."),
    ] = "auto"
    layer_decay: LayerDecay = "auto"
    bn: BatchNormPolicy = "frozen"


class AutoMethod(Section):
    """Start with the linear probe, train more stages while that improves the model, and keep the best."""

    type: Annotated[Literal["auto"], MethodType] = "auto"


MethodName = Literal["linear_probe", "partial", "full", "gradual", "auto"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
Method = Annotated[LinearProbe | Partial | Full | Gradual | AutoMethod, Field(discriminator="type")]


class Hyperparameters(Section):
    """Training settings. Every ``auto`` is resolved from the data, the backbone and the machine; the run records the values."""

    n_epochs: Annotated[
        Auto | Annotated[int, Field(ge=1, le=10_000)],
        Field(description="Number of epochs of the methods that train by steps. A linear probe takes no steps."),
    ] = "auto"
    batch_size: Annotated[Auto | Annotated[int, Field(ge=1, le=4096)], Field(description="Images per optimiser step.")] = "auto"
    train_size_px: Annotated[
        Auto | Annotated[int, Field(ge=32, le=1024)],
        Field(
            description="Side of the training images in pixels, for full and gradual; evaluation always uses "
            "model.input_size_px. "
            "auto: 0.8 of that size for pretrained weights."
        ),
    ] = "auto"
    learning_rate: Annotated[
        Auto | Annotated[float, Field(gt=0.0, le=10.0)],
        Field(description="Peak learning rate (AdamW) of the head and the topmost stage; lower stages get less (layer_decay)."),
    ] = "auto"
    learning_rate_multiplier: Annotated[
        Auto | Annotated[float, Field(gt=0.0, le=100.0)],
        Field(description="Factor on the learning rate, whether that is given or auto."),
    ] = "auto"
    weight_decay: Annotated[
        Auto | Annotated[float, Field(ge=0.0, le=10.0)],
        Field(description="Weight decay (decoupled L2 regularisation, AdamW) of training by steps; not on biases and norms."),
    ] = "auto"
    loss: Annotated[
        Literal["auto", LossName],
        Field(description=f"The loss of training by steps: {LOSS_MEANINGS}."),
    ] = "auto"
    label_smoothing: Annotated[
        Auto | Annotated[float, Field(ge=0.0, lt=1.0)],
        Field(description="Label smoothing of training by steps. 0: off."),
    ] = "auto"
    mixup: Annotated[
        float, Field(ge=0.0, le=10.0, description="Mixup: the alpha of the Beta distribution that images are mixed by. 0: off.")
    ] = 0.0
    warmup_fraction: Annotated[
        Auto | Annotated[float, Field(ge=0.0, lt=1.0)],
        Field(description="Share of the steps of each phase in which the learning rate rises linearly to its peak."),
    ] = "auto"
    early_stopping_epochs: Annotated[
        Auto | Annotated[int, Field(ge=1)] | None,
        Field(description="Stop after this number of epochs without improvement on the validation images. null: never."),
    ] = "auto"
    ema: Annotated[Auto | bool, Field(description="Evaluate and export an exponential moving average of the weights.")] = "auto"
    l2: Annotated[
        Auto | Annotated[float, Field(ge=0.0)],
        Field(description="L2 regularisation strength of the solved head. auto: chosen on the validation images."),
    ] = "auto"
    views: Annotated[
        Auto | Annotated[int, Field(ge=1, le=64)],
        Field(description="Augmented views of each image that the frozen stages are computed for and that are cached."),
    ] = "auto"
    refit: Annotated[
        Auto | bool,
        Field(
            description="Train once more at the end, on the training and validation images together, with what validation chose. "
            "auto: only with data.folds."
        ),
    ] = "auto"


class AugmentationSpec(Section):
    """A named policy, or explicit albumentations transforms: ``[{RandomCrop: {height: 200, width: 200}}, …]``."""

    policy: Annotated[
        Literal["none", "light", "default", "strong"],
        Field(
            description="Random changes of the training images: light crops slightly and never mirrors (for digits and text), "
            "default also mirrors, strong adds rotation, shear, blur and erasing."
        ),
    ] = "default"
    transforms: Annotated[
        tuple[dict[str, dict[str, Any]], ...] | None,
        Field(description="A list of albumentations transforms in place of the policy: [{HorizontalFlip: {p: 0.5}}]."),
    ] = None


class ExportSpec(Section):
    """How the trained model is exported and registered."""

    register_model: Annotated[
        Literal["auto", "always"],
        Field(
            description="auto registers the model as a new version unless it is no better than always predicting the same class; "
            "always registers it in any case."
        ),
    ] = "auto"
    quantize: Annotated[
        Literal["none", "int8"],
        Field(description="Quantise the exported model to int8; kept only if it is as accurate on the validation images."),
    ] = "none"


class ComputeSpec(Section):
    """Device, precision and threads. A run resumes bit-equal only with its original device and number of threads."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="Where to train. auto: a GPU if there is one.")] = "auto"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="Number format of the computation. auto: measured on this machine."),
    ] = "auto"
    threads: Annotated[
        Auto | Annotated[int, Field(ge=1, le=1024)], Field(description="CPU threads. auto: the cores available to the process.")
    ] = "auto"


SHORTHAND = {"model": "backbone", "method": "type", "augmentation": "policy"}
"""The sections for which a text may be given instead, with the key that the text is the value of."""
