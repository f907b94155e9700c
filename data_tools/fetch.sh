#!/bin/sh
# fetch.sh - where the public archives live, how large they are, and their MD5 sums; fetches and checks them.
#
#     sh data_tools/fetch.sh                      lists everything
#     sh data_tools/fetch.sh DIR mnist cifar10    fetches these sets below DIR, checks and unpacks them
#     sh data_tools/fetch.sh --check DIR celeba   checks files that you have fetched by other means
#
# Needs curl or wget, tar, and md5sum or md5.  A file whose size or sum is wrong is not unpacked.  Where no sum is known,
# the sum of what came is printed, for you to compare.  The owners' terms of use apply to every archive.
set -u

# set | file | bytes (-: not known) | MD5 (-: not known) | URL (or page, where no plain download exists)
table() {
    cat <<'TABLE'
mnist|train-images-idx3-ubyte.gz|9912422|f68b3c2dcbeaaa9fbdd348bbdeb94873|https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz
mnist|train-labels-idx1-ubyte.gz|28881|d53e105ee54ea40749a09fcbcd1e9432|https://ossci-datasets.s3.amazonaws.com/mnist/train-labels-idx1-ubyte.gz
mnist|t10k-images-idx3-ubyte.gz|1648877|9fb629c4189551a2d022fa330f9573f3|https://ossci-datasets.s3.amazonaws.com/mnist/t10k-images-idx3-ubyte.gz
mnist|t10k-labels-idx1-ubyte.gz|4542|ec29112dd5afa0611ce80d1b7f02629c|https://ossci-datasets.s3.amazonaws.com/mnist/t10k-labels-idx1-ubyte.gz
fashion|train-images-idx3-ubyte.gz|26421880|8d4fb7e6c68d591d4c3dfef9ec88bf0d|http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz
fashion|train-labels-idx1-ubyte.gz|29515|25c81989df183df01b3e8a0aad5dffbe|http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-labels-idx1-ubyte.gz
fashion|t10k-images-idx3-ubyte.gz|4422102|bef4ecab320f06d8554ea6380940ec79|http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-images-idx3-ubyte.gz
fashion|t10k-labels-idx1-ubyte.gz|5148|bb300cfdad3c16e7a12a480ee83cd310|http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-labels-idx1-ubyte.gz
cifar10|cifar-10-binary.tar.gz|170052171|c32a1d4ab5d03f1284b67883e8d87530|https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
cifar100|cifar-100-binary.tar.gz|168513733|03b5dce01913d631647c71ecec9e9cb8|https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz
waterbirds|waterbird_complete95_forest2water2.tar.gz|-|-|https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz
cub|CUB_200_2011.tgz|1150585339|97eceeb196236b17998738112f37df78|https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz
cub|segmentations.tgz|39272883|4d47ba1228eae64f2fa547c47bc65255|https://data.caltech.edu/records/w9d68-gec53/files/segmentations.tgz
places|train_large_places365standard.tar|-|67e186b496a84c929568076ed01a8aa1|http://data.csail.mit.edu/places/places365/train_large_places365standard.tar
places256|train_256_places365standard.tar|26103685120|53ca1c756c3d1e7809517cc47c5561c5|http://data.csail.mit.edu/places/places365/train_256_places365standard.tar
celeba|img_align_celeba.zip|1443490838|00d2c5bc6d35e252742224ab0c1e8fcb|page https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html
celeba|list_attr_celeba.txt|26721026|75e246fa4810816ffd6ee81facbd244c|page https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html
celeba|list_eval_partition.txt|-|d32c9cbf5e040fd4025c592c306e6668|page https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html
TABLE
}

say() { echo "fetch.sh: $*" >&2; }

list() {
    sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p'
    echo
    table | awk -F'|' '{ printf "%-10s %-42s %12s  %-32s  %s\n", $1, $2, $3, $4, $5 }'
    cat <<'NOTES'

-: not known here.  What each is for:
  mnist, cifar10, fashion   make_dominoes, make_cmnist; spurmem reads them as they are
  waterbirds                the published set, ready to use: spurmem inspect compares its counts
  cub, places (105 GB) or places256 (26 GB, the same pictures at 256 x 256)   make_waterbirds; of places only the four
                            folders b/bamboo_forest, f/forest/broadleaf, o/ocean and l/lake/natural are needed
  celeba                    make_celeba; spurmem reads it as it is.  Its files lie on a drive that wants a browser
NOTES
}

sum_of() {
    if command -v md5sum >/dev/null 2>&1; then md5sum "$1" | cut -d' ' -f1
    elif command -v md5 >/dev/null 2>&1; then md5 -q "$1"
    else echo "none"; fi
}

# check FILE BYTES SUM: 0 if it is there and right
check() {
    [ -f "$1" ] || { say "$1: is not there"; return 1; }
    have=$(($(wc -c <"$1")))
    if [ "$2" != - ] && [ "$have" != "$2" ]; then say "$1: has $have bytes, $2 are right: fetch it again"; return 1; fi
    sum=$(sum_of "$1")
    if [ "$sum" = none ]; then say "$1: neither md5sum nor md5 is installed; its sum is not checked"; return 0; fi
    if [ "$3" = - ]; then echo "$1: $have bytes, MD5 $sum; no sum is known here: compare it with the publisher's"; return 0; fi
    if [ "$sum" != "$3" ]; then say "$1: MD5 is $sum, $3 is right: remove it and fetch it again"; return 1; fi
    echo "$1: $have bytes, MD5 right"
}

download() {
    if command -v curl >/dev/null 2>&1; then curl -fL -C - -o "$1" "$2"
    elif command -v wget >/dev/null 2>&1; then wget -c -O "$1" "$2"
    else say "neither curl nor wget is installed"; return 1; fi
}

only_check=0
case ${1:-} in
    "") list; exit 0 ;;
    -h | --help) list; exit 0 ;;
    --check) only_check=1; shift ;;
    -*) say "unknown option $1; sh fetch.sh lists what there is"; exit 2 ;;
esac
if [ $# -lt 2 ]; then say "wants a folder and the names of sets: sh fetch.sh DIR mnist cifar10"; exit 2; fi
dir=$1
shift
for set in "$@"; do
    table | cut -d'|' -f1 | grep -qx "$set" || { say "there is no set $set; sh fetch.sh lists them"; exit 2; }
done
status=0
for set in "$@"; do
    mkdir -p "$dir/$set" || exit 1
    for row in $(table | grep "^$set|" | tr ' ' '#'); do
        row=$(echo "$row" | tr '#' ' ')
        file=$(echo "$row" | cut -d'|' -f2)
        bytes=$(echo "$row" | cut -d'|' -f3)
        sum=$(echo "$row" | cut -d'|' -f4)
        url=$(echo "$row" | cut -d'|' -f5)
        path=$dir/$set/$file
        case $url in
            page*) [ -f "$path" ] || { say "$file: get it with a browser from ${url#page } and put it into $dir/$set"; status=1; continue; } ;;
            *) if [ $only_check = 0 ] && ! { [ -f "$path" ] && [ "$bytes" != - ] && [ $(($(wc -c <"$path"))) = "$bytes" ]; }; then
                   download "$path" "$url" || { say "$url: could not be fetched"; status=1; continue; }
               fi ;;
        esac
        check "$path" "$bytes" "$sum" || { status=1; continue; }
        [ $only_check = 1 ] && continue
        case $file in
            *.tar.gz | *.tgz) tar -xzf "$path" -C "$dir/$set" || status=1 ;;
            *.tar) echo "$path: unpack what you need of it: tar -xf $path -C $dir/$set" ;;
            *.zip) command -v unzip >/dev/null 2>&1 && { unzip -qn "$path" -d "$dir/$set" || status=1; } ;;
        esac
    done
done
exit $status
