"""fetch_sdist.py PROJECT FILE SHA256 TARGET: downloads one source archive from the package index pip is configured for, and checks its hash.

pip itself cannot: to download a source archive it runs the archive's setup. Nothing of the archive is run here.
"""

import hashlib
import html.parser
import os
import pathlib
import subprocess
import sys
import urllib.parse
import urllib.request


class Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.hrefs += [value for key, value in attrs if tag == "a" and key == "href"]


def index_url() -> str:
    configured = os.environ.get("PIP_INDEX_URL") or subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True).stdout.strip()
    from pip._internal.models.index import PyPI  # pip's own default
    return configured or PyPI.simple_url


def main(project: str, file: str, digest: str, target: str) -> None:
    page = index_url().rstrip("/") + f"/{project}/"
    links = Links()
    links.feed(urllib.request.urlopen(page, timeout=60).read().decode())
    for href in links.hrefs:
        url = urllib.parse.urljoin(page, href)
        if urllib.parse.urlparse(url).path.endswith("/" + file):
            data = urllib.request.urlopen(url, timeout=300).read()
            if hashlib.sha256(data).hexdigest() != digest:
                sys.exit(f"fetch_sdist.py: {file} has another hash than the one this project was made with")
            pathlib.Path(target).write_bytes(data)
            return
    sys.exit(f"fetch_sdist.py: the package index has no {file}. Mend: check pip's configuration and the network")


if __name__ == "__main__":
    main(*sys.argv[1:])
