"""How gradients become updates: AdamW, Muon or the paper's Adagrad, the learning rate over a run, and clipping.

Knows the names of parameters (their states are saved by name), no data and no files. Parameters may be cut up over
devices (FSDP), Muon's not.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from training.config import OptimConfig
from training.devices import cut_like, is_cut, whole


class Optimizer:
    """The optimizer of a run with its clipping and its schedule."""

    def __init__(self, network: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self._names: dict[Tensor, str] = {
            parameter: name for name, parameter in network.named_parameters() if parameter.requires_grad
        }
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._matrices: list[tuple[nn.Parameter, nn.Parameter, int]] = []  # what Muon sees, of whom, which head
        self._inner = self._build(network)

    def _build(self, network: nn.Module) -> list[torch.optim.Optimizer]:
        config = self.config
        if config.name == "adagrad":
            return [ClippedAdagrad(self._groups(self._parameters), lr=config.lr, grad_clip=config.grad_clip)]
        hidden = _hidden_matrices(network) if config.name == "muon" else []
        rest = [parameter for parameter in self._parameters if not any(parameter is one for one in hidden)]
        inner: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self._groups(rest), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        ]
        if hidden:
            self._matrices = [part for parameter in hidden for part in _as_matrices(parameter)]
            self._names |= {matrix: f"{self._names[parameter]}[{head}]" for matrix, parameter, head in self._matrices}
            inner.append(
                torch.optim.Muon(
                    [matrix for matrix, _, _ in self._matrices],
                    lr=config.lr,
                    momentum=config.momentum,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",  # one learning rate for both optimizers
                )
            )
        return inner

    def _groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        """Vectors (norms, biases, spans) have no scale to decay; the position table is one matrix of all layers."""
        decayed = [p for p in parameters if p.dim() >= 2]
        rest = [p for p in parameters if p.dim() < 2]
        parts = [(part, self.config.weight_decay) for part in _whole_and_cut(decayed)]
        parts += [(part, 0.0) for part in _whole_and_cut(rest)]
        return [{"params": part, "weight_decay": decay} for part, decay in parts]

    def clip(self) -> float:
        """Bound the global gradient norm (the paper's Adagrad bounds each parameter's own) and return it."""
        bound = self.config.grad_clip if self.config.name != "adagrad" and self.config.grad_clip else math.inf
        parts = _whole_and_cut([parameter for parameter in self._parameters if parameter.grad is not None])
        norms = [whole(nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])) for part in parts]
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        for part in parts:
            nn.utils.clip_grads_with_norm_(part, bound, norm)
        return float(norm)

    def step(self, *, step: int, share: float) -> float:
        """Update, forget the gradients, and return the learning rate used.

        Args:
            step: updates made before this one.
            share: how much of the run is done, 0 .. 1.
        """
        rate = learning_rate(self.config, step=step, share=share)
        for matrix, parameter, head in self._matrices:
            matrix.grad = None if parameter.grad is None else _matrix_of(parameter.grad, head)
        for optimizer in self._inner:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.zero_grad()
        return rate

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in (*self._parameters, *(matrix for matrix, _, _ in self._matrices)):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of every parameter, by its name: whole tensors, however they are cut up over devices."""
        return {
            self._names[parameter]: {key: whole(value) for key, value in remembered.items()}
            for optimizer in self._inner
            for parameter, remembered in optimizer.state.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for optimizer in self._inner:
            for parameter in (one for group in optimizer.param_groups for one in group["params"]):
                optimizer.state[parameter] = {
                    key: cut_like(value, parameter) if value.dim() else value.to(parameter.device, copy=True)
                    for key, value in state.get(self._names[parameter], {}).items()
                }


def _whole_and_cut(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that are not cut up over devices and those that are, where there are any: torch does not mix them."""
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        parts[is_cut(parameter)].append(parameter)
    return [part for part in parts if part]


def _hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: the projections and persistent vectors of the layers; not what touches tokens or positions."""
    return [p for name, p in network.named_parameters() if name.startswith("layers.") and p.dim() >= 2]


def _as_matrices(parameter: nn.Parameter) -> list[tuple[nn.Parameter, nn.Parameter, int]]:
    """Muon takes matrices: each head's persistent vectors [H, N, D] are one, in the same memory."""
    heads = parameter.shape[0] if parameter.dim() == 3 else 1
    return [(nn.Parameter(_matrix_of(parameter.detach(), head)), parameter, head) for head in range(heads)]


def _matrix_of(tensor: Tensor, head: int) -> Tensor:
    return tensor[head] if tensor.dim() == 3 else tensor


def learning_rate(config: OptimConfig, *, step: int, share: float) -> float:
    """Linear warm-up over `warmup_steps`, times the schedule, which ends at `final_lr_fraction` of the peak.

    constant stays at the peak; cosine falls from the start; trapezoid falls in a line over the last `decay_fraction` of
    the run; step falls at once where that begins.

    Args:
        step: updates made before this one.
        share: how much of the run is done, 0 .. 1.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    match config.schedule:
        case "constant":
            left = 1.0
        case "cosine":
            left = 0.5 * (1 + math.cos(math.pi * share))
        case "trapezoid":
            left = min(1.0, (1 - share) / config.decay_fraction)
        case "step":
            left = float(share < 1 - config.decay_fraction)
    return config.lr * warm * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)


class ClippedAdagrad(torch.optim.Optimizer):
    """Adagrad whose step, not its accumulator, is scaled down where a parameter's gradient norm exceeds a bound.

    The optimizer of the paper's character models: the squares of the unclipped gradient are summed; a gradient of norm
    n > clip takes a step of lr * clip / n.
    """

    def __init__(self, params: Any, *, lr: float, grad_clip: float, eps: float = 1e-10) -> None:
        super().__init__(params, {"lr": lr, "grad_clip": grad_clip, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["sum"] = torch.zeros_like(parameter)
        gradient = gradient + group["weight_decay"] * parameter if group["weight_decay"] else gradient
        state["sum"].addcmul_(gradient, gradient)
        change = gradient / (state["sum"].sqrt() + group["eps"])
        if group["grad_clip"]:
            norm = whole(gradient.norm())
            change *= (group["grad_clip"] / (norm + group["eps"])).clamp(max=1)
        parameter.sub_(change, alpha=group["lr"])
