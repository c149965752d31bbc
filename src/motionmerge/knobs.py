"""Knobs: what a schedule's entry sets besides the weights, as values that print as they are read.

image: low_pass(0.4) + motion_amplitude(1.15)
attention: first_frame(-0.6)

Pure data; `switching/image_functions.py` computes with them.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar

from motionmerge.errors import RecipeError
from motionmerge.expressions import MAX_DEPTH, ExpressionReader
from motionmerge.named import named, number_text
from motionmerge.text import fix_unknown_name

_LARGEST = 10_000.0
"""What is added to scores or latents in fp16, which ends at 65,504: beyond, they are no numbers."""


@dataclass(frozen=True)
class Call:
    """A call of the recipe language: `name(positional, setting=...)`.

    Attributes:
        name: What recipes call it.
    """

    name: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self._arguments())})"

    def _arguments(self) -> list[str]:
        """Print what differs from the defaults; arguments without one go by their place."""
        texts = []
        for one in fields(self):
            value = getattr(self, one.name)
            text = str(value) if isinstance(value, Call) else number_text(value)
            if one.default is MISSING:
                texts.append(text)
            elif value != one.default:
                texts.append(f"{one.name}={text}")
        return texts

    @classmethod
    def usage(cls) -> str:
        """Write how it is called, e.g. `blur(sigma, kernel, strength=...)`."""
        names = (one.name if one.default is MISSING else f"{one.name}=..." for one in fields(cls))
        return f"{cls.name}({', '.join(names)})"

    def _check(self, what: str, value: object, least: float, most: float = math.inf) -> None:
        """Refuse what is no number from `least` to `most`.

        Raises:
            RecipeError: Such a value.
        """
        text = repr(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if math.isfinite(value) and least <= value <= most:
                return
            text = number_text(value)
            text += "" if text == number_text(value.real) else f" = {value.real:g}"  # a parameter
        expected = "a finite number"
        if not math.isinf(least):
            expected = f"a number from {least:g} {'on' if math.isinf(most) else f'to {most:g}'}"
        raise RecipeError(f"`{what}` of {self.name}() is {text}.", fix=f"Write {expected}.")


class Fade(Call):
    """How strong a filter of the image is as the steps go by.

    x is the share of the steps that are done, 0 at the first step and 1 at the last.
    """

    def at(self, x: float) -> float:
        """Return the strength at x, in [0, 1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Fade):
    """From `first` to `last`, which is reached at x = `end` and kept; at `end` 0 it stays first."""

    name: ClassVar[str] = "linear"
    first: float
    last: float
    end: float

    def __post_init__(self) -> None:
        self._check("first", self.first, 0, 1)
        self._check("last", self.last, 0, 1)
        self._check("end", self.end, 0, 1)

    def at(self, x: float) -> float:
        if self.end == 0:  # as the official code has it
            return float(self.first)
        if x >= self.end:
            return float(self.last)
        return self.first + (self.last - self.first) * x / self.end


@dataclass(frozen=True)
class Exponential(Fade):
    """exp(-rate x)."""

    name: ClassVar[str] = "exponential"
    rate: float

    def __post_init__(self) -> None:
        self._check("rate", self.rate, 0)

    def at(self, x: float) -> float:
        return math.exp(-self.rate * x)


class ImageKnob(Call):
    """A change of the condition image."""


class ImageFilter(ImageKnob):
    """A blurred image for the conditional pass alone, with strength 1 or one that fades.

    Under guidance g the prediction is u(I) + g (c(L I) - u(L I)), which takes a third pass; with
    no guidance, or a guidance of 1 in the same entry, it is c(L I).

    Source: ALG, 2025 (arXiv 2506.08456).
    """

    strength: Fade | None

    def _check_strength(self) -> None:
        if self.strength is not None and not isinstance(self.strength, Fade):
            raise RecipeError(
                f"`strength` of {self.name}() is {self.strength!r}.",
                fix=f"Write {Linear.usage()} or {Exponential.usage()}, or leave it out.",
            )


@dataclass(frozen=True)
class LowPass(ImageFilter):
    """The image scaled down to a share of its sides, and up again.

    Attributes:
        keep: The share; 1 changes nothing.
        strength: s; the share is 1 - (1 - keep) s.
    """

    name: ClassVar[str] = "low_pass"
    keep: float
    strength: Fade | None = None

    def __post_init__(self) -> None:
        self._check("keep", self.keep, 0, 1)
        self._check_strength()


@dataclass(frozen=True)
class Blur(ImageFilter):
    """The image under a Gaussian.

    Attributes:
        sigma: In pixels of the latents; 0 changes nothing.
        kernel: Its width in pixels, or below 1 as a share of the height; made odd upwards.
        strength: s; sigma is multiplied by it.
    """

    name: ClassVar[str] = "blur"
    sigma: float
    kernel: float
    strength: Fade | None = None

    def __post_init__(self) -> None:
        self._check("sigma", self.sigma, 0)
        self._check("kernel", self.kernel, 0, 4096)
        self._check_strength()


@dataclass(frozen=True)
class MotionAmplitude(ImageKnob):
    """The grey frames of the condition pushed away from the photo, in all passes.

    Attributes:
        amplitude: 1 changes nothing; 1.15 is usual.

    Source: ComfyUI-PainterI2V.
    """

    name: ClassVar[str] = "motion_amplitude"
    amplitude: float

    def __post_init__(self) -> None:
        self._check("amplitude", self.amplitude, 1, 10)


@dataclass(frozen=True)
class NoisyImage(ImageKnob):
    """Noise on the image in all passes, as strong as the mean of CIL's in training.

    beta = strength * sigmoid(2 s^power - 1), s being the noise level; new noise for every step.

    Attributes:
        strength: 100 in training; latents have a scale of about 1.
        power: The larger, the later the noise grows; `a` in the paper.
        seed: Of the noise.

    Paper: Zhao et al. 2024 (arXiv 2406.15735), which adds noise in training only.
    """

    name: ClassVar[str] = "time_noise"
    strength: float
    power: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check("strength", self.strength, 0, _LARGEST)
        self._check("power", self.power, 0)
        self._check("seed", self.seed, -math.inf)
        if not isinstance(self.seed, int):
            raise RecipeError(
                f"`seed` of {self.name}() is {number_text(self.seed)}.", fix="Write a whole number."
            )


@dataclass(frozen=True)
class FirstFrame(Call):
    """A number that is added to the scores of the first latent frame's keys in self-attention.

    In the conditional pass alone.

    Attributes:
        bias: Negative moves more; -0.6 is DyMoS'. 0 changes nothing. Within what fp16 holds.

    Source: DyMoS, 2026 (arXiv 2605.19398).
    """

    name: ClassVar[str] = "first_frame"
    bias: float

    def __post_init__(self) -> None:
        self._check("bias", self.bias, -_LARGEST, _LARGEST)


_FADES: tuple[type[Fade], ...] = (Linear, Exponential)
IMAGE_KNOBS: tuple[type[ImageKnob], ...] = (LowPass, Blur, MotionAmplitude, NoisyImage)

AnyCall = TypeVar("AnyCall", bound=Call)


def parse_image(
    text: str, *, where: str = "image", parameters: Mapping[str, float] | None = None
) -> tuple[ImageKnob, ...]:
    """Read the knobs of the condition image: those of all passes act first, filters last.

    Args:
        text: Calls with `+` between, e.g. `low_pass(0.4) + motion_amplitude(1.15)`.
        where: What the text is, for errors.
        parameters: Numbers that it may call by name.

    Raises:
        RecipeError: It is something else; a caret shows where.
    """
    return _Reader(text, where, parameters or {}).calls(IMAGE_KNOBS)


def parse_attention(
    text: str, *, where: str = "attention", parameters: Mapping[str, float] | None = None
) -> FirstFrame:
    """Read the knob of the self-attention, e.g. `first_frame(-0.6)`; see `parse_image`.

    Raises:
        RecipeError: It is something else, or several.
    """
    found = _Reader(text, where, parameters or {}).calls((FirstFrame,))
    if len(found) != 1:
        raise RecipeError(f"{where} has {len(found)} calls.", fix="Keep one of them.")
    return found[0]


def write_image(knobs: tuple[ImageKnob, ...]) -> str:
    """Print the knobs of the condition image; `parse_image` reads them back."""
    return " + ".join(map(str, knobs))


class _Reader(ExpressionReader):
    """Reads calls of knobs.

    Args:
        text: See `parse_image`.
        where: What it is.
        parameters: Numbers that it may call by name.
    """

    def __init__(self, text: str, where: str, parameters: Mapping[str, float]) -> None:
        super().__init__(text, where, shorter="Keep a few calls.")
        self._parameters = parameters

    def calls(self, kinds: tuple[type[AnyCall], ...]) -> tuple[AnyCall, ...]:
        """Read calls with `+` between."""
        tree, found = self._tree(), list[ast.expr]()
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
            found.append(tree.right)
            tree = tree.left
            if len(found) > MAX_DEPTH:
                raise self._fault(0, "Too many calls.", fix="Keep a few.")
        return tuple(self._call(node, kinds) for node in reversed([*found, tree]))

    def _call(self, node: ast.expr, kinds: tuple[type[AnyCall], ...]) -> AnyCall:
        known = {kind.name: kind for kind in kinds}
        usages = ", ".join(f"`{kind.usage()}`" for kind in kinds)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise self._fault(node, "Expected a call here.", fix=f"Write some of {usages}.")
        if node.func.id not in known:
            message = f"There is no `{node.func.id}()` here."
            raise self._fault(node, message, fix=fix_unknown_name(node.func.id, known))
        kind = known[node.func.id]
        wanted = [one.name for one in fields(kind) if one.default is MISSING]
        settings = [one.name for one in fields(kind) if one.default is not MISSING]
        usage = f"Write `{kind.usage()}`."
        if len(node.args) != len(wanted):
            message = f"{kind.name}() takes {len(wanted)} number(s), got {len(node.args)}."
            raise self._fault(node, message, fix=usage)
        values = {name: self._value(one) for name, one in zip(wanted, node.args, strict=True)}
        for keyword in node.keywords:
            if keyword.arg not in settings or keyword.arg in values:
                message = f"{kind.name}() has no setting `{keyword.arg}`."
                raise self._fault(keyword.value, message, fix=usage)
            values[keyword.arg] = self._value(keyword.value)
        made: AnyCall = self._build(node, lambda: kind(**values))
        return made

    def _value(self, node: ast.expr) -> Any:
        """Read a number, a parameter, what comes of them by `-` and `*`, or a fade."""
        if isinstance(node, ast.Constant):
            return self._number(node, instead="a number")
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            operand = self._value(node.operand)
            if isinstance(operand, (int, float)):
                return -operand
        if isinstance(node, ast.Name):
            if node.id in self._parameters:
                return named(self._parameters[node.id], node.id)
            message = f"There is no parameter `{node.id}`."
            raise self._fault(node, message, fix=self._fix_parameter(node.id))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            left, right = self._value(node.left), self._value(node.right)
            if isinstance(left, (int, float)) and isinstance(right, (int, float)):
                return left * right
        if isinstance(node, ast.Call):
            return self._call(node, _FADES)
        raise self._fault(node, "Expected a number here.", fix="Write a number or a parameter.")

    def _fix_parameter(self, name: str) -> str:
        if self._parameters:
            return fix_unknown_name(name, self._parameters)
        return f"Write a number, or add `parameters: {{{name}: ...}}` to the recipe."
