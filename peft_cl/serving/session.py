"""An adapter in use: it says what images show, learns classes from a few images, and takes them back."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..disk import local_path
from ..predicting import Prediction, classify
from ..scenarios import ImageTransform
from ..text import MOST, brief, plain
from .choices import Choice, choices_of
from .saving import save_adapter


#: Images that go through the model at once.
BATCH = 32
#: Facts of the configuration that teaching and forgetting change.
FACTS = ("classes", "tasks", "temperature", "head_options")


@dataclass(frozen=True)
class Answer:
    """What an image is taken for.

    Attributes:
        prediction: All classes with their probabilities, and the task's number; see `peft_cl.Prediction`.
        task: Name of the task that brought the best class; `None` where it was taught in this session, or there are
            no tasks (a stream).
        expert: Name of the task whose prompts the keys chose; `None` where rows of the pool say no task.
        choices: The prompts that the image got; none where all images get the same.
    """

    prediction: Prediction
    task: str | None
    expert: str | None
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Taught:
    """What `teach` did.

    Attributes:
        name: The class.
        images: How many images were shown.
        is_new: Whether the class was not known before.
        seconds: How long it took, with the pass over the images.
    """

    name: str
    images: int
    is_new: bool
    seconds: float


@dataclass(frozen=True, eq=False)
class Lesson:
    """A step: features (N, F) of images of a class, and the query (N, Q), are shown to the head."""

    name: str
    features: torch.Tensor
    query: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Removal:
    """A step: a class is taken out of the head."""

    name: str


class Session:
    """A loaded adapter that is used, and taught classes without training.

    A class is taught to a head that is computed from images (`ncm`, `lda`, `ridge`, `aligned`, or `fusion` of these):
    it gets a row, the head sees the images and is computed again. Prompts and backbone stay as they are.

    The state is always the adapter as it was loaded, plus a list of steps. Undoing, and forgetting a class that was
    taught here, compute the head again from the adapter as it was loaded and the steps that are left, so the result
    has the bits of a session in which the other steps were never made. Nothing is written before `save`.

    All methods may be called from several threads; they see one state.

    Args:
        model: A `PeftModel` with one of this library's adapters, which has learnt classes. To be taught it must be
            loaded with `is_trainable=True`.
        processor: The image processor that the adapter was learnt with.
        name: What the adapter is called.
        task_names: One for each of its tasks; `None`: `"task_0"`, `"task_1"`, ...

    Raises:
        ValueError: The adapter has learnt no classes, or another number of task names.

    Example:
        ```python
        >>> model = PeftModel.from_pretrained(base, "out", is_trainable=True)
        >>> session = Session(model, AutoImageProcessor.from_pretrained("out"))
        >>> session.teach("okapi", [Image.open(file) for file in files])
        Taught(name='okapi', images=5, is_new=True, seconds=0.4)
        >>> session.classify(Image.open("another.jpg")).prediction.names[0]
        'okapi'
        >>> session.save("taught")
        ```
    """

    def __init__(
        self, model: Any, processor: Any, *, name: str = "adapter", task_names: Sequence[str] | None = None
    ) -> None:
        self.model, self.processor, self.name = model.eval(), processor, name
        self.tuner = model.base_model
        self.adapter = model.active_adapter
        self.config = model.peft_config[self.adapter]
        if not self.config.tasks:
            raise ValueError("The adapter has learnt no classes yet, so it takes images for nothing. Train it first.")
        if task_names is not None and len(task_names) != self.config.num_tasks:
            raise ValueError(
                f"There are {len(task_names)} task names, but the adapter has {self.config.num_tasks} tasks. Give one "
                "for each, or leave task_names out."
            )
        self.task_names = tuple(task_names or (f"task_{number}" for number in range(self.config.num_tasks)))
        self.lock = threading.RLock()
        self._loaded_classes = tuple(self.config.classes)
        #: The head and the facts as they were loaded, as soon as there are steps.
        self._loaded: tuple[torch.nn.Module, dict[str, Any]] | None = None
        self._steps: tuple[Lesson | Removal, ...] = ()
        self._before: list[tuple[Lesson | Removal, ...]] = []
        #: Where it was saved to, and the steps that had been made then.
        self._folder: Path | None = None
        self._saved: tuple[Lesson | Removal, ...] = ()

    # ----------------------------------------------------------------------------------------------- what it knows

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes it knows, in the order of the head's rows."""
        with self.lock:
            return tuple(self.config.classes)

    @property
    def taught(self) -> tuple[str, ...]:
        """Names of the classes that were taught in this session."""
        with self.lock:
            return tuple(name for name in self.config.classes if self._is_taught(name))

    @property
    def can_undo(self) -> bool:
        return bool(self._before)

    @property
    def is_saved(self) -> bool:
        """Whether nothing has changed since it was loaded, or was last saved."""
        return self._steps == self._saved

    @property
    def why_not(self) -> str | None:
        """Why the adapter cannot be taught, in a sentence; `None` if it can."""
        with self.lock:
            head = self.tuner.head.active
            if not head.observes or head.needs_training:
                return (
                    f"The {head.title} head of this adapter takes nothing from images without training. Train the new "
                    "class as a task, or take an adapter whose head is computed from images: 'ncm', 'lda', 'ridge', "
                    "'aligned', or a 'fusion' of these."
                )
            try:
                self.tuner._learning_config()
                self.tuner.need_sums()
            except ValueError as error:
                place = str(self.config.source[0]) if self.config.source else None
                return str(error).replace(place, self.name) if place else str(error)  # a path of this machine
            return None

    def classify(self, image: Image.Image) -> Answer:
        """Say what an image shows: all classes with their probabilities, the task, and the prompts it got."""
        with self.lock:
            (prediction,) = classify(self.model, [image], self.processor, top_k=len(self.config.classes))
            known = prediction.task is not None and not self._is_taught(prediction.names[0])
            return Answer(
                prediction,
                self.task_names[prediction.task] if known else None,
                None if prediction.expert_task is None else self.task_names[prediction.expert_task],
                choices_of(self.tuner),
            )

    # ----------------------------------------------------------------------------------------------- teaching

    def teach(self, name: str, images: Sequence[Image.Image]) -> Taught:
        """Teach a class by images of it, without training; of a class that is known, show more images.

        Args:
            name: The class: text of up to 100 letters without line breaks and control characters.
            images: PIL images of any size and mode, at least one; a handful will do.

        Raises:
            ValueError: No such name, no images, or an adapter that cannot be taught (`why_not`).
        """
        began = time.perf_counter()
        name = check_class_name(name)
        if not images:
            raise ValueError(f"There is no image of {brief(name)}. Give at least one, or better five.")
        with self.lock:
            if self.why_not:
                raise ValueError(self.why_not)
            is_new = name not in self.config.classes
            lesson = Lesson(name, *self._features(images))
            self._go_to((*self._steps, lesson))
            return Taught(name, len(images), is_new, time.perf_counter() - began)

    def forget(self, name: str) -> None:
        """Take a class out. One that was taught here leaves no trace; one that the adapter came with is taken out by
        `forget_classes`, where the sums of its head are kept class by class.

        Raises:
            ValueError: It is not known, or cannot be taken out.
        """
        with self.lock:
            if name not in self.config.classes:
                raise ValueError(f"{brief(name)} is not known. Name one of {brief(list(self.config.classes))}.")
            if self.why_not:
                raise ValueError(self.why_not)
            if self._is_taught(name):
                first = self._last_removal(name) + 1
                later = [step for step in self._steps[first:] if step.name != name]
                self._go_to((*self._steps[:first], *later))
            else:
                self._go_to((*self._steps, Removal(name)))

    def undo(self) -> None:
        """Take back the last `teach` or `forget`: all is to the bit as it was before it.

        Raises:
            ValueError: Nothing was done yet.
        """
        with self.lock:
            if not self._before:
                raise ValueError("There is nothing to undo. Call teach or forget first.")
            self._go_to(self._before[-1], undoing=True)

    def save(self, folder: str | Path) -> Path:
        """Write the adapter as it is now into a folder, with its sums and its image processor, all or nothing.

        The record of the run that trained it is not among the files: it measures another adapter.

        Args:
            folder: A folder that is not there or empty, or the one that this session saved to before.

        Raises:
            FileExistsError: There is something else.
            OSError: It cannot be written.
        """
        with self.lock:
            path = local_path(folder)
            save_adapter(self.model, self.processor, path, replace=path == self._folder)
            self._folder, self._saved = path, self._steps
            return path

    # ----------------------------------------------------------------------------------------------- steps

    def _last_removal(self, name: str) -> int:
        """The place of the step that took a class out last; -1 if none did."""
        places = (place for place, step in enumerate(self._steps) if isinstance(step, Removal) and step.name == name)
        return max(places, default=-1)

    def _is_taught(self, name: str) -> bool:
        return name not in self._loaded_classes or self._last_removal(name) >= 0

    @torch.no_grad()
    def _features(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features (N, F) and query (N, Q) of images, as the head sees them."""
        transform, device = ImageTransform(self.processor), self.model.device
        parts = [
            self.tuner.features(transform(list(images[first : first + BATCH])).to(device))
            for first in range(0, len(images), BATCH)
        ]
        features, queries = zip(*parts, strict=True)
        if not all(part.isfinite().all() for part in features):
            raise ValueError(
                "The features of these images are not finite numbers: a backbone in float16 overflows. Load it in "
                "float32 (--dtype float32)."
            )
        return torch.cat(features), None if queries[0] is None else torch.cat(queries)

    def _go_to(self, steps: tuple[Lesson | Removal, ...], *, undoing: bool = False) -> None:
        """Have the head that these steps make of the adapter as it was loaded. If one fails, all is as before."""
        before = self._steps
        if self._loaded is None:
            self.tuner.need_sums()
            facts = {name: copy.deepcopy(getattr(self.config, name)) for name in FACTS}
            self._loaded = copy.deepcopy(self.tuner.head.active), facts
        try:
            self._take(before, steps)
        except BaseException:
            self._take((), before)
            raise
        self._steps = steps
        if undoing:
            self._before.pop()
        else:
            self._before.append(before)

    def _take(self, done: tuple[Lesson | Removal, ...], steps: tuple[Lesson | Removal, ...]) -> None:
        """Go on to `steps` from a head that has taken those in `done`, or from the adapter as it was loaded."""
        if not done or steps[: len(done)] != done:
            done = ()
            head, facts = self._loaded
            self.tuner.head.entries[self.adapter] = copy.deepcopy(head)
            for name, value in facts.items():
                setattr(self.config, name, copy.deepcopy(value))
            self.tuner.head.forget_rows()
            self.tuner.head.show_labels()
        for place in range(len(done), len(steps)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(place)  # rows of a trained part begin as noise: the same whenever a step is taken
                self._take_step(steps[place])

    def _take_step(self, step: Lesson | Removal) -> None:
        if isinstance(step, Removal):
            self.tuner.forget_classes([step.name])
            return
        if step.name not in self.config.classes:
            self.tuner.add_classes([step.name])
        head, row = self.tuner.head.active, self.config.classes.index(step.name)
        head.observe(step.features, torch.full((len(step.features),), row), step.query)
        head.fit()


def check_class_name(name: Any) -> str:
    """The name of a class without the spaces around it.

    Raises:
        ValueError: It is no text, empty, too long, or holds what cannot be shown.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError("The class has no name. Give one, such as 'okapi'.")
    name = name.strip()
    if len(name) > MOST:
        raise ValueError(f"The name of a class has {len(name)} letters, but may have {MOST}. Give a shorter one.")
    if plain(name) != name:
        raise ValueError(
            f"The name of a class holds letters that cannot be shown: {plain(name)!r}. Give a name of one line "
            "without control characters."
        )
    return name
