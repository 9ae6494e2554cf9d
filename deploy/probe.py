"""`python -m deploy.probe`: exit status 0 while the server of this container takes work, else 1 and the reason.

For the image's HEALTHCHECK and for exec probes. Port and API keys are those that the server itself finds in the
environment and in the file that ALLATTN_CONFIG names; flags given to the server are not seen.
"""

import os
import sys
from http.client import HTTPConnection, HTTPException

from server.config import load_settings

TIMEOUT_S = 5


def main() -> str | None:
    """None while work is taken, else why not."""
    settings = load_settings([], environ=os.environ)
    keys = settings.all_api_keys()
    headers = {"Authorization": f"Bearer {keys[0].get_secret_value()}"} if keys else {}
    host = "127.0.0.1" if settings.host == "0.0.0.0" else "::1" if settings.host == "::" else settings.host
    connection = HTTPConnection(host, settings.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health/ready", headers=headers)
        response = connection.getresponse()
        return None if response.status == 200 else f"{response.status}: {response.read().decode()}"
    except (OSError, HTTPException) as error:
        return f"{host}:{settings.port}: {error}"
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
