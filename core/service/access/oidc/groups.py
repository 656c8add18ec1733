"""From a person's groups to tenants and scopes, by the operator's setting."""

from collections.abc import Collection, Mapping
from typing import Any

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.keys import ALL_SCOPES
from nightpress.core.settings import GroupGrant

_MOST_GROUPS = 10_000


def groups_in(claims: Mapping[str, Any], claim: str) -> frozenset[str] | None:
    """The groups of a claim, which may be a list or a single name. `claim`: its name; dots go inside. None: the claim is missing.

    A claim whose name itself has dots, such as `https://example.com/groups`, is found too.
    """
    value: Any = claims
    if claim in claims:
        value = claims[claim]
    else:
        for part in claim.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        return frozenset({value})
    if not isinstance(value, list):
        return None
    return frozenset(item for item in value[:_MOST_GROUPS] if isinstance(item, str))


class GroupRules:
    """The setting OIDC_GROUPS. Its order decides in which tenant a person of several begins."""

    def __init__(self, grants: Mapping[str, GroupGrant]) -> None:
        """Raises NightpressError(invalid_request) for a scope that doesn't exist."""
        unknown = sorted({scope for grant in grants.values() for scope in grant.scopes} - ALL_SCOPES)
        if unknown:
            raise NightpressError(
                ErrorCode.INVALID_REQUEST,
                f"NIGHTPRESS_OIDC_GROUPS names scopes that don't exist: {', '.join(unknown)}.",
                hint=f"There are: {', '.join(sorted(ALL_SCOPES))}.",
            )
        self._grants = grants

    def known(self, groups: Collection[str]) -> list[str]:
        """The groups that the setting names, in its order."""
        return [group for group in self._grants if group in groups]

    def scopes_by_tenant(self, groups: Collection[str]) -> dict[str, frozenset[str]]:
        """Tenant → scopes, in the order of the setting. Groups of one tenant add up."""
        found: dict[str, frozenset[str]] = {}
        for group in self.known(groups):
            grant = self._grants[group]
            found[grant.tenant] = found.get(grant.tenant, frozenset()) | grant.scopes
        return found

    def choose(self, groups: Collection[str], tenant_id: str | None) -> str:
        """The tenant to act in: the wanted one, or the first. Raises NightpressError(forbidden) for a person without it."""
        tenants = self.scopes_by_tenant(groups)
        if not tenants:
            raise NightpressError(
                ErrorCode.FORBIDDEN,
                "You have signed in, but none of your groups may use this service.",
                hint="Ask its operator to add one of your groups to NIGHTPRESS_OIDC_GROUPS.",
            )
        if tenant_id is None:
            return next(iter(tenants))
        if tenant_id not in tenants:
            raise NightpressError(
                ErrorCode.FORBIDDEN,
                "None of your groups belongs to this tenant.",
                hint=f"Yours are: {', '.join(tenants)}.",
            )
        return tenant_id
