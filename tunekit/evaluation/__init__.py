"""Evidence: pictures before and after, scores with floor and ceiling, and the report.

embedders.py  pictures and words -> unit vectors        judges.py   which of them judge a run
scores.py     unit vectors -> numbers, pure functions   measure.py  draw, embed, score
verdict.py    numbers -> plain words                    report.py   all of it -> one HTML file
charts.py     curves as SVG                             facts.py    what taught it, how long
"""
