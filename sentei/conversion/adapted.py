"""A module with stacked weights [E, O, I], such as the experts of a layer, of which some have adapters."""

from typing import Any

from torch import nn
from torch.func import functional_call

from sentei.axes.rank import Config, LowRankStack
from sentei.conversion.experts import function_of, is_experts, routed
from sentei.core.errors import RuleError, UnsupportedError
from sentei.core.rules import All


class AdaptedStacks(nn.Module):
    """Stands in the place of `base` and is called as it is. Each adapter, a `LowRankStack`, has its weight's name.

    Experts of transformers are computed one by one, each with its own factors for its own tokens, under any rule. Of
    other modules, as `MixtureOfExperts`, the changed weights W + s·BA are made whole in each call: of the rule All
    alone, without dropout, at the cost of all weights and their gradients, as PEFT does. Merged, all run as ever.

    Args:
        base: the module; it keeps its parameters, without gradients.
        configs: of the adapters, by the names of its own parameters; that `check` accepts.
    """

    def __init__(self, base: nn.Module, configs: dict[str, Config]):
        super().__init__()
        self.base, self.each = base, is_experts(base)
        for name, config in configs.items():
            self.add_module(name, LowRankStack(getattr(base, name), config))
        self.train(base.training)

    @property
    def stacks(self) -> dict[str, LowRankStack]:
        """The adapters, in the order of the module's own parameters."""
        return {name: self._modules[name] for name, _ in self.base.named_parameters(recurse=False)
                if name in self._modules}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `base` answers with its weights changed."""
        stacks = self.stacks
        if self.each and any(stack.merged is None for stack in stacks.values()):
            functions = [function_of(self.base, e, stacks) for e in range(len(next(iter(stacks.values()))))]
            return routed(self.base, *args, **kwargs, experts=functions)
        for stack in stacks.values():
            stack.rank.tap.bypass("merged weights" if stack.merged is not None else "a weight made whole")
        return functional_call(self.base, {name: stack.whole() for name, stack in stacks.items()}, args, kwargs)

    def plain(self, *, fold: bool) -> nn.Module:
        """The module as it was, or with the changed weights in new parameters."""
        for name, stack in self.stacks.items():
            if fold:
                self.base.register_parameter(name, nn.Parameter(stack.merged, requires_grad=False))
        return self.base.train(self.training)


def check(base: nn.Module, configs: dict[str, Config]) -> None:
    """Whether `AdaptedStacks` can be made of these.

    Raises:
        UnsupportedError: weights stored [E, I, O].
        RuleError: a rule or a dropout that a module with weights made whole cannot have.
    """
    name = type(base).__name__
    if getattr(base, "is_transposed", False):
        raise UnsupportedError("adapters", expected="stacked weights [E, O, I]", got=f"{name}, whose are [E, I, O]",
                               do="name other layers")
    for config in configs.values():
        if not is_experts(base) and (not isinstance(config.rule, All) or config.dropout):
            raise RuleError("adapters", expected=f"the rule All and no dropout in {name}", got=repr(config),
                            do="change the adapter, or name other layers")
