"""Analyses: axes as types, data flow, token spaces. `analyse(graph)` gives them all."""

from .axes import AxisTypes
from .explain import Explanation, explain
from .flow import Flow
from .spaces import Analysis, Block, TokenSpace, analyse

__all__ = ["Analysis", "AxisTypes", "Block", "Explanation", "Flow", "TokenSpace", "analyse", "explain"]
