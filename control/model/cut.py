#!/usr/bin/env python3
"""Cuts botocore's model of EC2 to the actions that Hostplane answers.

Run by hand, where botocore is installed, whenever an action is added:

    python3 control/model/cut.py >control/model/actions.json

The list of actions is `control/model/actions.txt`. Only names and types are
taken. In the output a scalar is one letter (s text, i integer, d real, b
boolean, t timestamp, x bytes) or the list of an enumeration's values; a list
is `{"l": shape}`, a structure `{"m": {wire name: shape or name}, "r": [required]}`.
Wire names differ by direction: a request capitalises them, an answer does not.
"""

import json
import sys
from pathlib import Path

from botocore.loaders import Loader

HERE = Path(__file__).parent
SCALARS = {"string": "s", "integer": "i", "long": "i", "double": "d", "float": "d",
           "boolean": "b", "timestamp": "t", "blob": "x"}
# A longer enumeration (instance types, chiefly) says what Amazon sells, not
# what a request may say.
ENUM_VALUES_MAX = 40


def wire_name(member_name, member, request):
    if not request:
        return member.get("locationName", member_name)
    if "queryName" in member:
        return member["queryName"]
    name = member.get("locationName", member_name)
    return name[0].upper() + name[1:]


def cut(model, name, request, out):
    """Adds the shape to `out` and returns how to refer to it."""
    shape = model["shapes"][name]
    kind = shape["type"]
    if kind in SCALARS:
        values = shape.get("enum", [])
        return values if request and 0 < len(values) <= ENUM_VALUES_MAX else SCALARS[kind]
    if name not in out:
        out[name] = None  # A shape may contain itself.
        if kind == "list":
            out[name] = {"l": cut(model, shape["member"]["shape"], request, out)}
        elif kind == "structure":
            required = set(shape.get("required", []))
            out[name] = {
                "m": {wire_name(n, m, request): cut(model, m["shape"], request, out)
                      for n, m in shape["members"].items()},
                "r": [wire_name(n, m, request)
                      for n, m in shape["members"].items() if n in required],
            }
        else:
            sys.exit(f"{name}: no rule for the type {kind}")
    return "#" + name


def main():
    model = Loader().load_service_model("ec2", "service-2", "2016-11-15")
    table = {"actions": {}, "request": {}, "answer": {}}
    for action in (HERE / "actions.txt").read_text().split():
        operation = model["operations"][action]
        entry = {}
        for key, request in (("input", True), ("output", False)):
            if key in operation:
                side = table["request" if request else "answer"]
                entry[key] = cut(model, operation[key]["shape"], request, side)[1:]
        table["actions"][action] = entry
    json.dump(table, sys.stdout, sort_keys=True, separators=(",", ":"))
    print()


main()
