"""Devices that models are measured on: this machine, Android over adb, Linux over ssh."""
