"""Atom feeds (RFC 4287)."""

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from nightpress.core.wire.promotions import PromotionView

MEDIA_TYPE = "application/atom+xml"
_ATOM = "http://www.w3.org/2005/Atom"
_CAUSES = {"accepted": "Accepted", "manual": "Promoted by a person"}


def promotions_feed(name: str, promotions: Sequence[PromotionView], public_url: str) -> bytes:
    """The feed of a model name's promotions. promotions: at least one, newest first. public_url: of the web page; empty: no links."""
    ET.register_namespace("", _ATOM)
    feed = ET.Element(_tag("feed"))
    _put(feed, "id", f"urn:nightpress:model:{name}")
    _put(feed, "title", f"Results of {name}")
    _put(feed, "updated", promotions[0].created_at.isoformat())
    ET.SubElement(_put(feed, "author"), _tag("name")).text = "Nightpress"
    for promotion in promotions:
        entry = _put(feed, "entry")
        _put(entry, "id", f"urn:nightpress:promotion:{promotion.id}")
        _put(entry, "title", f"{name}: {promotion.recipe}")
        _put(entry, "updated", promotion.created_at.isoformat())
        command = f"nightpress pull {promotion.job_id}"
        _put(entry, "summary", f"{_CAUSES[promotion.cause]}: job {promotion.job_id}. To fetch it: {command}")
        if public_url:
            page = f"{public_url.rstrip('/')}/#/jobs/{promotion.job_id}"
            ET.SubElement(entry, _tag("link"), {"rel": "alternate", "type": "text/html", "href": page})
    written: bytes = ET.tostring(feed, encoding="utf-8", xml_declaration=True)
    return written


def _put(parent: ET.Element, name: str, text: str | None = None) -> ET.Element:
    element = ET.SubElement(parent, _tag(name))
    element.text = text
    return element


def _tag(name: str) -> str:
    return f"{{{_ATOM}}}{name}"
