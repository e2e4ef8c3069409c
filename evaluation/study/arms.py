"""What the study compares, as data: budgets, arms, and the question that each group of arms answers.

An arm is the base with one thing changed: its start (which towers, how many vectors, which loss) or its training
(which sides, which stages, how much noise). `evaluation.study.steps` turns an arm into commands,
`evaluation.study.report` its scores into the tables of docs/study.md.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """How much of everything; the same for all arms.

    Args:
        num_scenes: training scenes; the reader sees these and as many of held-out combinations.
        num_heldout: scenes that scores are computed on.
        max_objects: most objects in a scene.
        hidden_size, num_hidden_layers: of the language model.
        stage_steps: optimizer steps of each stage.
        batch_size: rows of one side in one step.
        num_questions: questions asked, equally many of each type.
        reader_steps: optimizer steps of a reader.
    """

    num_scenes: int
    num_heldout: int
    max_objects: int
    hidden_size: int
    num_hidden_layers: int
    stage_steps: dict[str, int]
    batch_size: int
    learning_rate: float
    num_questions: int
    reader_steps: int


BUDGETS = {
    # one object in a scene: with two of them and these steps the base names 58 of 100 answers, but draws 3 of 100
    # objects, and nothing can be compared at the floor (docs/log.md)
    "reduced": Budget(
        num_scenes=8000,
        num_heldout=500,
        max_objects=1,
        hidden_size=128,
        num_hidden_layers=4,
        stage_steps={"pretrain": 300, "detail": 300, "instruct": 600},
        batch_size=16,
        learning_rate=2e-3,
        num_questions=720,
        reader_steps=1000,
    ),
    # as pisces-tiny itself was trained: docs/tiny.md
    "full": Budget(
        num_scenes=60000,
        num_heldout=1500,
        max_objects=4,
        hidden_size=192,
        num_hidden_layers=6,
        stage_steps={"pretrain": 1000, "detail": 1000, "instruct": 4000},
        batch_size=32,
        learning_rate=1e-3,
        num_questions=1800,
        reader_steps=4000,
    ),
    # finds out whether everything runs; its numbers mean nothing
    "toy": Budget(
        num_scenes=24,
        num_heldout=6,
        max_objects=2,
        hidden_size=32,
        num_hidden_layers=1,
        stage_steps={"pretrain": 1, "detail": 1, "instruct": 1},
        batch_size=2,
        learning_rate=1e-3,
        num_questions=9,
        reader_steps=2,
    ),
}


@dataclass(frozen=True)
class Start:
    """The checkpoint an arm starts from: two of the towers, how they are pooled, and the image loss.

    A tower named twice is shared. The generation tower understands from its last layer, before the narrow projection
    that makes the vectors: width 128 for either tower.
    """

    vision_tower: str = "vision_tower"
    gen_vision_tower: str = "gen_vision_tower"
    pool_stride: int = 2
    loss: str = "mse"

    @property
    def flags(self) -> list[str]:
        """For `finetune.parts assemble`, but for the folders."""
        layer = ["--vision_feature_layer", "-1"] if self.vision_tower == "gen_vision_tower" else []
        return ["--gen_pool_stride", str(self.pool_stride), "--gen_loss_type", self.loss, *layer]

    @property
    def vectors(self) -> str:
        """A name for the vectors that it draws: arms that share it share a reader."""
        return f"{self.gen_vision_tower}_{self.pool_stride}"


STARTS = {
    "base": Start(),
    "shared_siglip": Start(gen_vision_tower="vision_tower"),
    "shared_gen_clip": Start(vision_tower="gen_vision_tower"),
    "vectors_4": Start(pool_stride=4),
    "vectors_64": Start(pool_stride=1),
    "cosine": Start(loss="cosine"),
}


@dataclass(frozen=True)
class Arm:
    """One way to train, as the base or with one thing changed.

    Args:
        label: its words in tables and plots.
        start: a key of `STARTS`.
        sides: blocks of a step: "u" understanding, "g" generation. What a block of a side says depends on seed, stage
            and number alone, so arms see the same rows of a side in the same order.
        stages: stage names of `finetune.train_stages`, each with the stages of the budget whose steps it takes.
        input_noise: `gen_input_noise` while training.
    """

    label: str
    start: str = "base"
    sides: str = "ug"
    stages: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {name: (name,) for name in ("pretrain", "detail", "instruct")}
    )
    input_noise: float = 0.0


ARMS = {
    "base": Arm("base: two encoders, both sides, three stages, 16 vectors, MSE"),
    "shared_siglip": Arm("SigLIP-like tower for both", start="shared_siglip"),
    "shared_gen_clip": Arm("gen-CLIP for both", start="shared_gen_clip"),
    "understanding_alone": Arm("understanding alone", sides="u"),
    "generation_alone": Arm("generation alone", sides="g"),
    "no_detail": Arm("short captions instead", stages={"pretrain": ("pretrain", "detail"), "instruct": ("instruct",)}),
    "vectors_4": Arm("4 vectors", start="vectors_4"),
    "vectors_64": Arm("64 vectors", start="vectors_64"),
    "cosine": Arm("cosine", start="cosine"),
    "input_noise": Arm("MSE with input noise 0.1", input_noise=0.1),
}


@dataclass(frozen=True)
class Question:
    """One claim and the arms that are held against the base; `base` is what the base is called there."""

    title: str
    claim: str
    base: str
    arms: tuple[str, ...]


QUESTIONS = {
    "encoders": Question(
        "(a) Two encoders or one?",
        "separate encoders beat one shared encoder",
        "two encoders",
        ("shared_siglip", "shared_gen_clip"),
    ),
    "joint": Question(
        "(b) Do the two sides help each other?",
        "joint training helps both tasks",
        "both sides together",
        ("understanding_alone", "generation_alone"),
    ),
    "detail": Question(
        "(c) What does the stage with detailed captions bring?",
        "the detailed-caption stage helps generation",
        "with detailed captions",
        ("no_detail",),
    ),
    "vectors": Question(
        "(d) How many vectors?",
        "the number of generation vectors matters; few enough for a language model to predict one by one",
        "16 vectors",
        ("vectors_4", "vectors_64"),
    ),
    "loss": Question(
        "(e) Which loss?",
        "the paper regresses by MSE; cosine and noise on the inputs are what neighbours do",
        "MSE",
        ("cosine", "input_noise"),
    ),
}
