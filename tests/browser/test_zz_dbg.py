import sys; sys.path.insert(0,'/work/main')
import urllib.request, urllib.error, json, pytest
from tests.browser.conftest import *
def test_x(stack):
    for q in ("candles?symbol=ES&timeframe=1m&limit=2","instruments?limit=6","instruments?q=ES&limit=20","candles?symbol=GLBX:ES&timeframe=1m&limit=1"):
        try: print(q, urllib.request.urlopen(f"{stack.url}/api/v1/{q}").read()[:1500])
        except urllib.error.HTTPError as e: print(q, e.code, e.read())
