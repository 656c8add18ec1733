"""The operator's prices: what an hour of a CPU worker or of a GPU costs, by queue and by kind of GPU."""

from collections.abc import Mapping

from nightpress.core.settings import Settings

MICROS = 1_000_000  #: money is kept in millionths of the currency, as whole numbers, so that sums are exact
_HOUR_S = 3600.0


class PriceList:
    """The setting PRICES. Without it, nothing costs anything and no cost is shown."""

    def __init__(self, prices: Mapping[str, float], currency: str) -> None:
        self.currency = currency
        self._prices = dict(prices)
        #: part of a GPU's name → price; the longest part that a name has decides
        self._kinds = sorted(
            ((name.partition(":")[2].casefold(), price) for name, price in prices.items() if ":" in name),
            key=lambda kind: -len(kind[0]),
        )

    @classmethod
    def of(cls, settings: Settings) -> "PriceList":
        return cls(settings.prices, settings.currency)

    def __bool__(self) -> bool:
        return bool(self._prices)

    def per_hour(self, queue: str, device: str | None) -> float | None:
        """The price of an hour. `device`: the GPU's name as its worker reports it; None: unknown. None: the queue has no price."""
        if queue == "gpu" and device is not None:
            name = device.casefold()
            for part, price in self._kinds:
                if part in name:
                    return price
        return self._prices.get(queue)

    def micros(self, queue: str, device: str | None, seconds: float) -> int:
        """What so many seconds cost, in millionths of the currency."""
        return round((self.per_hour(queue, device) or 0.0) * max(0.0, seconds) / _HOUR_S * MICROS)


UNPRICED = PriceList({}, "")
