"""Debian's Chromium without a window, driven by selenium."""

import os
import shutil
import subprocess

ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
WEBGL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")  # in software; further arguments of pages that draw with it


def install_chromium():
    """Return why there is no browser, having tried to install Debian's; empty if there is one."""
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return ""
    if os.geteuid() or not shutil.which("apt-get"):
        return "chromium and chromedriver are not installed, and only root with apt-get can install them"
    install = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-y", "--no-install-recommends", "chromium", "chromium-driver"]
    for command in (["apt-get", "update"], install):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
        if done.returncode:
            return f"{' '.join(command[:2])} failed: {done.stderr.strip()[-200:]}"
    return ""


def start_chromium(*arguments):
    """Start the browser with further arguments; it keeps the console's messages."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (*ARGUMENTS, *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
