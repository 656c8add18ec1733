"""Opens the source that an address names."""

from nightpress.core.settings import Settings
from nightpress.core.sources.address import Address, BucketAddress
from nightpress.core.sources.source import Source


def open_source(address: Address, settings: Settings) -> Source:
    # boto3 takes 0.2 s to import, httpx 0.1 s: import what the address asks for.
    if isinstance(address, BucketAddress):
        from nightpress.core.sources.bucket import BucketSource

        return BucketSource(address, settings)
    from nightpress.core.sources.hub import HubSource
    from nightpress.core.sources.split_source import SplitSource

    hub = HubSource(address, settings)
    return hub if address.choice is None else SplitSource(address, address.choice, hub)
