"""The cellular automaton: its 3x3 attention, its local rule, and the engines that run it."""

from automaton.engines import grow
from automaton.rule import LocalRule

__all__ = ["LocalRule", "grow"]
