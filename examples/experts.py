"""The room `experts`: train a small mixture from scratch, see who works, who is dead and what is not computed.

The text is in three made-up languages, each with its own rule for the next letter; a layer of experts must learn all
three. With one seed and one number of steps: a dense layer of all the neurons; a dense layer of those a token keeps;
and mixtures, unbalanced, balanced by a loss and balanced by a bias.

Run from the repository's root: python -m examples.experts
"""

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.experts import Config, MixtureOfExperts
from sentei.axes.experts.balance import balancing
from sentei.axes.experts.dense import FeedForward
from sentei.axes.experts.gates import Renormalised, Sigmoid
from sentei.core.rules import TopK
from sentei.core.tracing import trace
from sentei.measurement.specialisation import Load, Specialisation, loads, specialisation

LETTERS, LANGUAGES, TOKENS, WIDTH, UNIT, NUM_EXPERTS, KEPT = 24, 3, 32, 48, 16, 16, 2
STEPS, BATCH, PARTS = 240, 32, 2


class Reader(nn.Module):
    """Foretells the next letter from the last two and the language's mark, through one feed-forward layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.letter, self.before = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LETTERS, WIDTH)
        self.language = nn.Embedding(LANGUAGES, WIDTH)
        self.layer, self.head = layer, nn.Linear(WIDTH, LETTERS)

    def forward(self, text: torch.Tensor, language: torch.Tensor) -> torch.Tensor:
        """Logits [B, T - 1, LETTERS] of the letters from the third on; text int64 [B, T + 1], language int64 [B]."""
        x = self.letter(text[:, 1:-1]) + self.before(text[:, :-2]) + self.language(language)[:, None]
        return self.head(x + self.layer(F.layer_norm(x, (WIDTH,))))


def texts(count: int, tables: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Text int64 [count, TOKENS + 2] and its language: nine letters of ten follow the table of the last two."""
    language = torch.randint(LANGUAGES, (count,), generator=generator)
    text = torch.randint(LETTERS, (count, TOKENS + 2), generator=generator)
    follows = torch.rand(count, TOKENS + 2, generator=generator) < 0.9
    for t in range(2, TOKENS + 2):
        text[:, t] = torch.where(follows[:, t], tables[language, text[:, t - 2], text[:, t - 1]], text[:, t])
    return text, language


def loss_of(model: Reader, text: torch.Tensor, language: torch.Tensor) -> torch.Tensor:
    """The mean loss in nats."""
    return F.cross_entropy(model(text, language).flatten(0, 1), text[:, 2:].flatten())


def train(model: Reader, tables: torch.Tensor, balance_loss: float) -> None:
    """STEPS steps, each in PARTS parts, as if the memory were short; the balance is that of the whole step."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(STEPS):
        with balancing(model) as balance:
            parts = [texts(BATCH, tables, generator) for _ in range(PARTS)]
            loss = sum(loss_of(model, *part) for part in parts) / PARTS
        if balance_loss:
            loss = loss + balance.loss(switch=balance_loss, z=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(model.layer, MixtureOfExperts) and model.layer.experts.bias is not None:
            model.layer.update_bias()


def describe(load: Load, languages: Specialisation) -> str:
    """Who works, in one line."""
    return (f"entropy {load.entropy:.2f}, worst load {1 + load.violation:.1f}x the mean, dead {list(load.dead)}, "
            f"unknown {list(load.unknown)}, language tells {languages.information:.2f} bit of the expert "
            f"(shuffled {languages.by_chance.mean():.2f})")


def main() -> None:
    """One line a layer: its loss on unseen text, and what it multiplies a token; under a mixture, who works."""
    generator = torch.Generator().manual_seed(0)
    tables = torch.randint(LETTERS, (LANGUAGES, LETTERS, LETTERS), generator=generator)
    text, language = texts(400, tables, generator)
    noise = -(0.9 + 0.1 / LETTERS) * torch.tensor(0.9 + 0.1 / LETTERS).log() \
        - 0.1 * (LETTERS - 1) / LETTERS * torch.tensor(0.1 / LETTERS).log()
    print(f"the best there can be{noise:>29.3f} nats\nsaying nothing{torch.tensor(float(LETTERS)).log():>36.3f}")
    neurons = UNIT * NUM_EXPERTS
    top = {"rule": TopK(KEPT), "unit": UNIT}
    for name, make, balance_loss in (
        ("dense, all neurons", lambda: FeedForward(WIDTH, neurons), 0.0),
        ("dense, as many as a token keeps", lambda: FeedForward(WIDTH, UNIT * KEPT), 0.0),
        ("mixture, unbalanced", lambda: MixtureOfExperts(Config(**top, gate=Renormalised()), width=WIDTH,
                                                         neurons=neurons), 0.0),
        ("mixture, balanced by a loss", lambda: MixtureOfExperts(Config(**top, gate=Renormalised()), width=WIDTH,
                                                                 neurons=neurons), 0.02),
        ("mixture, balanced by a bias", lambda: MixtureOfExperts(Config(**top, gate=Sigmoid(speed=3e-3)), width=WIDTH,
                                                                 neurons=neurons), 0.0),
    ):
        torch.manual_seed(0)
        model = Reader(make())
        train(model, tables, balance_loss)
        model.eval()
        with torch.no_grad(), trace(model) as records:
            unseen = loss_of(model, text, language)
        cost = records.cost()
        done, choosing = (1.0, 0.0) if not records else (cost.density(), cost.choosing / cost.dense_multiply_adds)
        size = sum(weight.numel() for weight in model.layer.parameters())
        print(f"{name:<36}{unseen:>14.3f}    {size:>7,} weights, multiplies {done:.3f} of them a token, "
              f"{choosing:.3f} more to choose")
        for path in records.paths():
            print(f"    {describe(loads(records)[path], specialisation(records.at(path), [language], shuffles=20))}")


if __name__ == "__main__":
    main()
