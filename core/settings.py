"""One Settings object. Every default works on a laptop; every value can come from NIGHTPRESS_* variables or a .env file."""

import re
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

#: Claims that people may change at their provider: they give no rights.
_CHANGEABLE_CLAIMS = frozenset({"email", "name", "nickname", "preferred_username", "profile", "website"})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class GroupGrant(BaseModel):
    """What the members of a group may do: the scopes of keys, in one tenant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    scopes: frozenset[str] = Field(min_length=1)


class Settings(BaseSettings):
    """The settings of an installation. Sizes are in bytes and durations in seconds."""

    model_config = SettingsConfigDict(env_prefix="NIGHTPRESS_", env_file=".env", extra="ignore", frozen=True)

    data_dir: Path = Field(
        default_factory=lambda: Path.home() / ".nightpress",
        description="Where the embedded stack keeps its database, objects, broker and keys.",
    )
    database_url: str = Field("", description="SQLAlchemy URL. Empty: SQLite in data_dir.")
    broker_url: str = Field(
        "", description="Redis or Valkey URL. Empty: the embedded server's unix socket in data_dir."
    )

    storage_url: str = Field("", description="s3://bucket/prefix or a folder. Empty: data_dir/objects.")
    s3_endpoint_url: str | None = Field(None, description="For S3-compatible stores other than AWS.")
    s3_public_endpoint_url: str | None = Field(
        None, description="The store's address in presigned URLs, if clients reach it by another one."
    )
    s3_region: str = "us-east-1"
    s3_access_key_id: SecretStr | None = Field(
        None, description="Empty: boto3 looks for credentials in its usual places."
    )
    s3_secret_access_key: SecretStr | None = None

    api_host: str = "127.0.0.1"
    api_port: int = 8790
    api_connections: int = Field(
        2000,
        ge=1,
        description="Most connections that one API process keeps open. Its limit of open files may allow fewer.",
    )
    api_connections_per_address: int = Field(
        500,
        ge=1,
        description="Most of these connections from one address. Behind a reverse proxy all come from one address: set it to API_CONNECTIONS.",
    )
    api_client_patience_s: float = Field(
        30.0, gt=0, description="Time that a client has to send a request's head, and then every 30 KB of its body."
    )
    model_roots: list[Path] = Field(
        default_factory=list, description="Server folders from which models and data may be registered by path."
    )
    source_prefixes: list[str] = Field(
        default_factory=list,
        description="Buckets or folders in them from which models and data may be fetched, e.g. s3://models/released.",
    )
    source_s3_endpoint_url: str | None = Field(None, description="The store of those buckets. Empty: S3_ENDPOINT_URL.")
    source_s3_access_key_id: SecretStr | None = Field(None, description="Its key. Empty: the storage's own.")
    source_s3_secret_access_key: SecretStr | None = None
    hub_organisations: list[str] = Field(
        default_factory=list,
        description="Organisations and users of the Hugging Face Hub whose models and data may be fetched. Empty: none.",
    )
    hub_endpoint: str = Field("https://huggingface.co", description="The Hub, or a mirror that speaks its API.")
    hub_token: SecretStr | None = Field(None, description="For private and gated repositories of those organisations.")
    hub_download_domains: list[str] = Field(
        default_factory=lambda: ["huggingface.co", "hf.co"],
        description="Domains that the Hub may redirect a download to, besides its own.",
    )
    passes: list[str] = Field(
        default_factory=list,
        description="Installed packages, or single passes of them, that recipes may use: see docs/how-to/write-a-pass.md. Their code runs in the API, the control process and workers. Empty: none.",
    )
    verify_inline_bytes: int = Field(
        128 * 1024**2,
        description="Models and data up to this size are verified within the request. The control process verifies larger ones, and data of many rows.",
    )
    max_model_bytes: int = 2 * 1024**4
    max_dataset_bytes: int = 4 * 1024**3
    max_body_bytes: int = 1024**2
    max_queued_jobs: int = Field(
        10_000, description="Queued jobs one tenant may have, unless its quota says otherwise."
    )
    max_running_jobs: int = Field(0, description="Jobs of one tenant that may run at a time; 0: no bound.")
    max_storage_bytes: int = Field(
        0, description="Bytes that one tenant's models, data and artifacts may take; 0: no bound."
    )
    max_gpu_seconds_month: int = Field(
        0, description="GPU time one tenant may use in a calendar month (UTC), counted for each GPU; 0: no bound."
    )
    rate_limit_per_minute: int = Field(0, description="Requests one key may make a minute; 0 switches the limit off.")
    schedule_min_interval_s: float = Field(300.0, description="The least time between two fires of a schedule.")

    prices: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description='What an hour of a CPU worker or of a GPU costs, by queue and by a part of a GPU\'s name, as JSON, e.g. {"cpu": 0.4, "gpu": 2.5, "gpu:H200": 4.1}. API and control process need the same. Empty: no costs are shown.',
    )
    currency: str = Field("EUR", pattern=r"^[A-Za-z]{1,8}$", description="The name of the currency of prices.")
    max_cost_day: int = Field(
        0, ge=0, description="What one tenant may spend in a day (UTC), in that currency; 0: no bound."
    )
    max_cost_month: int = Field(
        0, ge=0, description="What one tenant may spend in a calendar month (UTC), in that currency; 0: no bound."
    )

    secret_key: SecretStr | None = Field(
        None,
        description="The key that webhooks' secrets and the signing key are derived from. API and control process need the same one. Empty: a file in data_dir.",
    )
    credential_keys: list[SecretStr] = Field(
        default_factory=list,
        description="The keys that encrypt the credentials of destinations, newest first. The first encrypts; all of them decrypt. Empty: a key derived from SECRET_KEY.",
    )
    destinations: list[str] = Field(
        default_factory=list,
        description="Prefixes of the addresses that results may be delivered to, e.g. s3://models/released, hf://organisation, oci://registry.example.com/team. Empty: none.",
    )
    destination_networks: list[IPv4Network | IPv6Network] = Field(
        default_factory=list,
        description="Private networks that deliveries to the Hub and to registries may reach, e.g. 10.0.0.0/8. There, http is allowed too.",
    )
    destination_s3_endpoint_url: str | None = Field(
        None, description="The store of the buckets among DESTINATIONS. Empty: S3_ENDPOINT_URL."
    )
    public_url: str = Field(
        "",
        description="The address at which people open the page, e.g. https://nightpress.example.com, for links in messages and feeds. Signing in by OIDC needs it. Empty: no links.",
    )
    oidc_issuer: str = Field(
        "",
        description="The OpenID Connect provider that people sign in with, as its discovery document names it, e.g. https://login.example.com/realms/ml. Empty: keys alone.",
    )
    oidc_name: str = Field("single sign-on", max_length=60, description="What the page calls the provider.")
    oidc_client_id: str = Field("", description="The page's client at the provider.")
    oidc_client_secret: SecretStr | None = Field(
        None, description="Its secret. Empty: a public client, with PKCE alone."
    )
    oidc_cli_client_id: str = Field(
        "", description="The command line's client: public, with the device flow. Empty: OIDC_CLIENT_ID."
    )
    oidc_audiences: list[str] = Field(
        default_factory=list,
        description="Further audiences whose tokens the API accepts, besides these two clients.",
    )
    oidc_algorithms: list[Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"]] = (
        Field(
            ["RS256", "PS256", "ES256"],
            min_length=1,
            description="Signatures that the API accepts on the provider's tokens.",
        )
    )
    oidc_scopes: list[str] = Field(
        default_factory=lambda: ["openid", "profile", "email"],
        description="Scopes to ask the provider for. Add offline_access where it gives refresh tokens only then, and the scope of groups where it has one.",
    )
    oidc_prompt: Literal["", "consent", "login", "select_account"] = Field(
        "",
        description="What the provider shows at every sign-in of the page. Some give refresh tokens only after `consent`. Empty: as the provider likes.",
    )
    oidc_groups_claim: str = Field(
        "groups", description="The claim with a person's groups; dots go inside, e.g. realm_access.roles."
    )
    oidc_groups: dict[str, GroupGrant] = Field(
        default_factory=dict,
        description='Group → tenant and scopes, as JSON, e.g. {"ml": {"tenant": "ml", "scopes": ["jobs:read", "jobs:write"]}}. A person of several tenants begins in the one that comes first.',
    )
    oidc_recheck_s: float = Field(
        900.0, gt=0, description="How often a session's groups are asked for again, with its refresh token."
    )
    session_idle_s: float = Field(
        2 * 3600.0, gt=0, description="A session of the page ends after this time without use."
    )
    session_s: float = Field(12 * 3600.0, gt=0, description="A session of the page ends after this time in any case.")
    webhook_networks: list[IPv4Network | IPv6Network] = Field(
        default_factory=list,
        description="Private networks that webhooks may reach, e.g. 10.0.0.0/8. There, http and any port are allowed too.",
    )

    smtp_url: SecretStr | None = Field(
        None,
        description="The mail server for webhooks of the kind `email`: smtp://[user:password@]host[:port], with STARTTLS where it is offered, or smtps://…. User and password are ASCII, percent-encoded. API and control process need it. Empty: no e-mail.",
    )
    mail_from: str = Field("", description="The sender of e-mail, e.g. Nightpress <nightpress@example.com>.")
    mail_domains: list[str] = Field(
        default_factory=list, description="Domains that e-mail may be sent to, e.g. example.com. Empty: none."
    )

    mlflow_url: str = Field(
        "",
        description="An MLflow tracking server that is told of every job and study, e.g. https://mlflow.example.com. Only the control process needs it, with `nightpress[trackers]`. Empty: none.",
    )
    mlflow_token: SecretStr | None = Field(
        None, description="Its bearer token. For a user and a password, set MLFLOW_TRACKING_USERNAME and …_PASSWORD."
    )
    trackio_url: str = Field("", description="A self-hosted Trackio server that is told of them. Empty: none.")
    trackio_token: SecretStr | None = Field(None, description="Its write token.")
    tracker_project: str = Field(
        "nightpress",
        description="A tenant's runs are in MLflow's experiment NAME/TENANT and in Trackio's project NAME-TENANT.",
    )

    lease_ttl_s: float = 60.0
    stall_s: float = 1800.0
    run_limit_s: float = 24 * 3600.0
    max_failures: int = Field(3, ge=1, le=20, description="Failed attempts before a job is failed for good.")
    retry_backoff_s: float = Field(
        5.0,
        description="Pause before the first retry of a failed attempt. It doubles each time, with jitter, up to ten minutes.",
    )
    tick_s: float = 2.0
    drain_s: float = 30.0

    worker_queue: Literal["cpu", "gpu"] = "cpu"
    worker_memory: int = Field(
        0, description="Memory a worker offers to jobs; 0: 80% of what the machine or cgroup has."
    )
    worker_threads: int = Field(
        0,
        description="CPU threads a worker offers; 0: the cores this process may use. Jobs that run at a time share them, by their GPUs.",
    )
    worker_cpu_jobs: int = Field(
        0,
        ge=0,
        le=64,
        description="Jobs of the queue cpu that a worker of the queue gpu runs beside those on its GPUs.",
    )
    worker_spare: bool = Field(True, description="Keep one child with torch imported, waiting for the next job.")
    cache_bytes: int = Field(50 * 1024**3, description="Bound of the worker's content-addressed cache.")
    checkpoint_bytes: int = Field(
        200 * 1024**3,
        description="Bytes of unfinished work that storage keeps of one job, so that another worker can continue it; 0 keeps none.",
    )
    checkpoint_after_s: float = Field(
        30.0, description="Unfinished work is stored only for attempts that last longer than this."
    )
    checkpoint_keep_s: float = Field(
        72 * 3600.0,
        description="How long unused unfinished work is kept after its job has ended. Other jobs that begin with the same passes use it.",
    )
    vllm_python: Path | None = Field(
        None,
        description="The Python of an environment with vLLM, which `make vllm` makes. Jobs then also run artifacts for vLLM in it. Empty: vLLM is not run.",
    )
    sandbox_network: bool = Field(True, description="Take the network away from children, where the kernel allows it.")

    keep_artifacts_days: int = Field(
        0,
        ge=0,
        description="Days after a job's end until its artifacts are deleted; 0: never. Reports stay, and so do artifacts that are promoted or a schedule's last.",
    )
    keep_jobs_days: int = Field(
        0, ge=0, description="Days after a job's end until it is deleted, with its history, report and log; 0: never."
    )
    keep_fetched_days: int = Field(
        30,
        ge=0,
        description="Days until a fetched model or data set is deleted, once a newer one has its name; 0: never.",
    )
    keep_source_days: int = Field(
        30,
        ge=0,
        description="Days that the measured outputs of a source are kept after their last use, so that later jobs on the same model don't measure them again; 0 keeps none.",
    )
    keep_history_days: int = Field(90, ge=1, description="Days that runs of schedules and deliveries are kept.")
    keep_audit_days: int = Field(
        0, ge=0, description="Days until a line of the audit log is deleted, at least 30; 0: never."
    )

    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="The port on which a worker or control process serves metrics to Prometheus; 0: none.",
    )
    otlp_endpoint: str = Field(
        "",
        description="The collector that traces are sent to by OTLP over HTTP, e.g. http://collector:4318. Empty: OpenTelemetry's own OTEL_EXPORTER_OTLP_ENDPOINT, if it is set.",
    )
    metrics_access: Literal["open", "key"] = Field(
        "open", description="Who may read the API's /metrics: everybody, or only keys with the scope metrics:read."
    )
    log_format: Literal["text", "json"] = "text"
    log_level: str = "INFO"

    @field_validator("public_url", "oidc_issuer")
    @classmethod
    def _encrypted(cls, value: str) -> str:
        """Refuse http elsewhere than on this machine: codes, tokens and cookies would cross the network in the clear."""
        scheme, host = urlsplit(value).scheme, urlsplit(value).hostname
        if value and scheme != "https" and not (scheme == "http" and host in _LOOPBACK):
            raise ValueError("an address that begins with https:// is needed; http:// is for this machine alone")
        return value

    @field_validator("prices")
    @classmethod
    def _of_queues(cls, prices: dict[str, float]) -> dict[str, float]:
        if wrong := [name for name in prices if not re.fullmatch(r"cpu|gpu|gpu:.+", name)]:
            raise ValueError(f"{wrong[0]!r} is no queue: give cpu, gpu, or gpu: and a part of a GPU's name")
        return prices

    @model_validator(mode="after")
    def _sign_in_is_complete(self) -> "Settings":
        if self.oidc_issuer and not (self.public_url and self.oidc_client_id and self.oidc_groups):
            raise ValueError("OIDC_ISSUER also needs PUBLIC_URL, OIDC_CLIENT_ID and OIDC_GROUPS")
        if urlsplit(self.public_url).path not in {"", "/"}:
            raise ValueError("PUBLIC_URL can't have a path: the page lies at the root of its host")
        if self.oidc_groups_claim in _CHANGEABLE_CLAIMS:
            raise ValueError(f"OIDC_GROUPS_CLAIM can't be {self.oidc_groups_claim}: people may change it themselves")
        return self

    @cached_property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'nightpress.db'}"

    @cached_property
    def celery_url(self) -> str:
        password = f":{self.broker_password}@" if self.broker_password else ""
        return self.broker_url or f"redis+socket://{password}{self.broker_socket}?virtual_host=0"

    @property
    def broker_socket(self) -> Path:
        """The embedded Valkey server's socket."""
        return self.data_dir / "valkey.sock"

    @property
    def broker_password_file(self) -> Path:
        """The file to which the embedded stack writes the Valkey server's password. Only its owner may read it."""
        return self.data_dir / "valkey.password"

    @property
    def broker_password(self) -> str:
        """The embedded Valkey server's password. Empty if no server has started in this folder yet."""
        try:
            return self.broker_password_file.read_text().strip()
        except OSError:
            return ""

    @cached_property
    def objects_url(self) -> str:
        return self.storage_url or str(self.data_dir / "objects")

    @property
    def key_file(self) -> Path:
        """The file to which the embedded stack writes its API key, and from which the CLI reads it."""
        return self.data_dir / "key"


def load_settings() -> Settings:
    """Read the environment once, at a process's start; pass the result down."""
    return Settings()
