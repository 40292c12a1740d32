"""What a run says about itself: figures, key numbers, one HTML page per subject, methods text.

:mod:`~qsmpipe.reports.maps` holds the maps of one acquisition, :mod:`~qsmpipe.reports.figures`
draws them, :mod:`~qsmpipe.reports.numbers` measures them. :mod:`~qsmpipe.reports.page` and
:mod:`~qsmpipe.reports.boilerplate` are made from the records that runs leave in ``logs/``
(:mod:`qsmpipe.records`) and need neither images nor Nipype.
"""
