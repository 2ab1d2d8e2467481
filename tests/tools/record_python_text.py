#!/usr/bin/env python3
"""Records what Python's str.lower(), capitalize() and strip() make of odd texts, as a fixture.

    record_python_text.py > tests/fixtures/data/python_text.json

Beside the texts: the FNV-1a hash (64 bits) of what becomes of every code point, one after another, each behind an "x" for
lower case and in front of one for title case.
"""
import json
import sys
import unicodedata

TEXTS = ["", "a", "A", "hE TAKES", "the Man IN BLACK", "\u00dfa\u00df", "\ufb01SH", "\u01c6X", "\u01c5X", "\u0130STANBUL",
         "\u0131x", "\u039f\u0394\u039f\u03a3", "\u039f\u0394\u039f\u03a3.", "\u039f\u0394\u039f\u03a3\u0391", "\u03a3",
         "A\u0301\u03a3\u0301", "A\u00ad\u03a3\u00ad\u00adB", ".\u03a3", "\u0149A", "\u1f80X", "\u1f88X", "\u10d0\u10d1",
         "\u1c90\u1c91", "\U00010428\U00010400", "\u0414\u041e\u041c", "\u00c9COLE", "\u00e9COLE", "1ST PLACE", "\u2167 X",
         "\u24b6\u24d1", "'TIS THE", "\u4e2d\u6587ABC", "\u1e9eX", "x\u1e9e", "\ua64a\u1c88", "\u01f0X"]
SPACES = ["  a b \n", "\u00a0\u2003a\u3000", "\x1c\x1d\x1e\x1f\x85a\x0b\x0c", "\u200ba\u200b", "\ufeffa", "\u180ea\u180e", "   ",
          "\u2028\u2029\u202f\u205f\u1680x"]


def fnv1a(texts):
    found = 0xcbf29ce484222325
    for text in texts:
        for byte in text.encode():
            found = (found ^ byte) * 0x100000001b3 % 2**64
    return f"{found:016x}"


def main():
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    print(json.dumps({
        "recorded_with": f"Python {sys.version.split()[0]}, Unicode {unicodedata.unidata_version}",
        "cases": [{"text": t, "lower": t.lower(), "capitalized": t.capitalize()} for t in TEXTS],
        "stripped": [{"text": t, "strip": t.strip(), "rstrip": t.rstrip()} for t in SPACES],
        "lower_of_all": fnv1a(("x" + c).lower() for c in characters),
        "capitalized_of_all": fnv1a((c + "X").capitalize() for c in characters),
    }, indent=1))


if __name__ == "__main__":
    main()
