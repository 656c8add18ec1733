"""`python -m nightpress.api`: serve on the address of the settings, 127.0.0.1 by default."""

import socket

import uvicorn

from nightpress.api.app import create_app
from nightpress.api.connections import configure
from nightpress.core.logs import configure_logging
from nightpress.core.settings import load_settings
from nightpress.core.tracing import configure_tracing


class Server(uvicorn.Server):
    """Ends event streams before it shuts down. Otherwise uvicorn would wait for their readers, which wait for jobs to end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app = self.config.app
        app.state.services.tail.close()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def main() -> None:
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    configure_tracing(settings.otlp_endpoint, "api")
    config = configure(
        create_app(settings),
        settings,
        host=settings.api_host,
        port=settings.api_port,
        timeout_graceful_shutdown=10,
    )
    Server(config).run()


if __name__ == "__main__":
    main()
