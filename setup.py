"""Package metadata comes from settings.ini; setuptools only."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
readme = here / "README.md"
EXTRAS = ("train", "book", "jupyter", "dev")  # each holds those before it


def words(*keys):
    "The distinct requirements under `keys`, in order."
    found = (word for key in keys for word in cfg[key].split())
    return list(dict.fromkeys(found))


def extra(name):
    "The requirements of an extra."
    within = EXTRAS[: EXTRAS.index(name) + 1]
    return words(*(f"{each}_requirements" for each in within))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["py.typed", "scripts/*"]},
    install_requires=words("requirements"),
    extras_require={name: extra(name) for name in EXTRAS},
    entry_points={
        "console_scripts": [f"{cfg['lib_name']}={cfg['lib_path']}.__main__:main"],
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
