/* test_jpeg.c - the JPEG decoder and encoder (section JPEG): the conformance files, golden hashes made with Pillow
 * (tests/golden/make_jpeg.py), damaged and hostile files, failing memory. */
#include "../spurmem.h"
#include "sha256.h"
#include "failing.h"

/* ---- helpers ---- */

/* The picture that golden/make_jpeg.py draws. */
static void draw(spm_context *ctx, int w, int h, spm_image *image)
{
    int x, y, c;
    if (spm_image_create(ctx, w, h, image, NULL) != SPM_OK) exit(1);
    for (y = 0; y < h; y++)
        for (x = 0; x < w; x++)
            for (c = 0; c < 3; c++)
                image->pixels[(y * w + x) * 3 + c] =
                    (uint8_t)(x * (7 + 2 * c) + y * (13 - 3 * c) + x * y * (c + 1) / 5);
}

static spm_status decode(spm_context *ctx, const void *data, size_t size, int scale, int truncated, spm_image *image,
                         spm_error *err)
{
    spm_decode_desc desc = SPM_ZERO;
    memset(err, 0, sizeof *err);
    desc.scale = scale;
    desc.allow_truncated = truncated;
    return spm_image_decode(ctx, "test.jpg", data, size, &desc, image, err);
}

static void hash_image(const spm_image *image, char *hex)
{
    sha256_hex(image->pixels, (size_t)image->width * (size_t)image->height * 3, hex);
}

static size_t from_hex(const char *text, uint8_t *out)
{
    size_t n = 0;
    for (; text[0] && text[1]; text += 2) {
        int high = text[0] <= '9' ? text[0] - '0' : text[0] - 'a' + 10;
        int low = text[1] <= '9' ? text[1] - '0' : text[1] - 'a' + 10;
        out[n++] = (uint8_t)(high << 4 | low);
    }
    return n;
}

/* A 40 x 24 picture with 4:2:0 chroma, encoded. */
static uint8_t *encoded(spm_context *ctx, int quality, size_t *size)
{
    spm_image image = SPM_ZERO;
    uint8_t *data = NULL;
    draw(ctx, 40, 24, &image);
    CHECK_INT(spm_image_encode_jpeg(ctx, &image, quality, 1, &data, size, NULL), SPM_OK);
    spm_image_free(ctx, &image);
    return data;
}

/* ---- golden hashes ---- */

static const struct { int width, height, quality, halved; const char *file, *pixels; } encoder_cases[] = {
    {40, 24, 75, 1, "7d3f438313e2df08a33fa71bf2ac18e186167cd649ee39f399f9b8a3c15dc86c",
     "3fe6f55350f46a98a986aa503b1823644f2080290b7895cd1ac61b5d19a44b90"},
    {37, 21, 90, 0, "89020034caf2005c794368636e93c532f68d51e6fff88abbbdf1d25722d57767",
     "5f4d930bf7ebc39e0355431f25f119921fc5f2b7ce06e4b52593c5ae5ffb2d5f"},
    {17, 33, 30, 1, "47072412db61efb9fbfa7634659d5305dc1d445f3b38d3231ca8a574b44aa4fe",
     "a21d998d6f4d669e1ecfa78fd46ca7e5b2180cb89364906fd9695c7414f30539"},
    {1, 1, 50, 1, "35505b202f852c46a0542973f644076c0278abef2d27edbc5723626ce5eb83f2",
     "709e80c88487a2411e1ee4dfb9f22a861492d20c4765150c0c794abd70f8147c"},
    {9, 1, 100, 0, "d7cc95e3b42fd53f171eafa1b7813c7ecb76b913059fe56537dd1349dd66cac8",
     "1bd626fcb3ecef0ba7c141c4649cb0fd922548e63e20b6acede613408fc64966"},
    {16, 16, 1, 1, "5daffdfc25f3c038b01b96d70defdfc689fbab148ae8316b10692b706e0f8b3e",
     "df0873b87854dbe24a8e0b9e37310128d697c8a332d97a5c8072eea61b08025d"},
    {250, 3, 95, 1, "0ec87ba132efc43d98b0006b3bdb451f8fca8fc22d34519bf1d8903e456b8f3d",
     "076e8409d9b1a539e83ab3d5d666e2cce9516bcb96151585bf446f299b9b821a"},
};

static void encoder_matches_pillow(void)
{
    spm_context *ctx = spm_context_create(NULL);
    size_t i;
    for (i = 0; i < sizeof encoder_cases / sizeof encoder_cases[0]; i++) {
        spm_image image = SPM_ZERO, back = SPM_ZERO;
        spm_error err;
        uint8_t *data = NULL;
        size_t size = 0;
        char hex[65];
        draw(ctx, encoder_cases[i].width, encoder_cases[i].height, &image);
        CHECK_INT(spm_image_encode_jpeg(ctx, &image, encoder_cases[i].quality, encoder_cases[i].halved, &data, &size,
                                        NULL), SPM_OK);
        sha256_hex(data, size, hex);
        CHECK_STR(hex, encoder_cases[i].file);
        CHECK_INT(decode(ctx, data, size, 0, 0, &back, &err), SPM_OK);
        hash_image(&back, hex);
        CHECK_STR(hex, encoder_cases[i].pixels);
        spm_image_free(ctx, &image);
        spm_image_free(ctx, &back);
        spm_free(ctx, data);
    }
    spm_context_destroy(ctx);
}

static const struct { int scale, width, height; const char *pixels; } scaled_cases[] = {
    {2, 38, 42, "ca84ac1805c945074792be50926e24cdc000457f5a4e9ac5b0790947fc36a0e2"},
    {4, 19, 21, "6c293c8b40c9b568ec8278706aec1337806d964bbfed2857135af3c04ab8e591"},
    {8, 10, 11, "4e8664f635f84d3c2d31c4621847987331142bb8e13cb5e9180c75ea3dd84ac1"},
};

static void scaled_decoding_matches_pillow(void)
{
    spm_context *ctx = spm_context_create(NULL);
    spm_image image = SPM_ZERO;
    uint8_t *data = NULL;
    size_t size = 0, i;
    spm_error err;
    char hex[65];
    draw(ctx, 75, 83, &image);
    CHECK_INT(spm_image_encode_jpeg(ctx, &image, 85, 1, &data, &size, NULL), SPM_OK);
    spm_image_free(ctx, &image);
    for (i = 0; i < sizeof scaled_cases / sizeof scaled_cases[0]; i++) {
        CHECK_INT(decode(ctx, data, size, scaled_cases[i].scale, 0, &image, &err), SPM_OK);
        CHECK_INT(image.width, scaled_cases[i].width);
        CHECK_INT(image.height, scaled_cases[i].height);
        hash_image(&image, hex);
        CHECK_STR(hex, scaled_cases[i].pixels);
        spm_image_free(ctx, &image);
    }
    CHECK_INT(decode(ctx, data, size, 3, 0, &image, &err), SPM_E_ARGUMENT);
    spm_free(ctx, data);
    spm_context_destroy(ctx);
}

static const struct { const char *name; int width, height; const char *pixels, *file; } files[] = {
    {"progressive 2x2 with restarts", 35, 29,
     "65fac19d28168c43bab5ab39d728d15d7efd6db3aed5186fcdaeaec7684b060d",
     "ffd8ffe000104a46494600010100000100010000ffdb00831000500037003c0046003c00320050004600410046005a00550050005f0078"
     "00c800820078006e006e007800f500af00b9009100c8012200ff0131012c011d00ff011801130140016801cc01860140015401b3015901"
     "13011801900221019501b301db01ea020302080203013601810235025d023001f4025801cc01f9020301efffdb0083110055005a005a00"
     "780069007800eb0082008200eb01ef014a0118014a01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef"
     "01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01"
     "ef01ef01ef01ef01ef01efffc2001108001d002303012200021101031101ffc40017000101010100000000000000000000000000010203"
     "ffc4001501010100000000000000000000000000000001ffdd00040002ffda000c03010002100310000001c74b835953ffd0829658ffd1"
     "45024fffc4001810000301010000000000000000000000000001101102ffda0008010100010502c30fffd0d9ffd1c11fffd26cc3ffd39f"
     "ffd46247ffd573ffd69fffd7e847ffd09fffc4001811010003010000000000000000000000000010213171ffda0008010301013f0171ff"
     "d08fffd1d53fffc40014110100000000000000000000000000000010ffda0008010201013f013fffd03fffd13fffc40015100101000000"
     "00000000000000000000001021ffda0008010100063f023fffd03fffd13fffd287ffd33fffd43fffd53fffd63fffd73fffd03fffc4001d"
     "100101000202030100000000000000000001001011314121617181ffda0008010100013f21213fffd0416d6fffd182ffd2dbe3844fffd3"
     "f97edfffd47d60ffd55d18ffd6dfa8e6ffd75a00ee17ffd0e5c7ffda000c0301000200030000001010cfffd0f26fffd170efffc4001911"
     "00030101010000000000000000000000000111312161ffda0008010301013f10826f07ffd09e9269ffd1ef0b0a7fffc4001a1100030100"
     "03000000000000000000000000012131115161ffda0008010201013f1022f59fffd0a3de11ffd1c84e8fffc40020100100020104020300"
     "00000000000000000100112110314151618171a1b1ffda0008010100013f10d2bfffd0c099630fffd1b76e8fffd247b1dbb9cccfffd350"
     "685bf515e5fa9fffd4540e3bd2ffd51f07ec0c5b809fffd6a1b5ceee1bb3ccffd74f9c1853ffd0721c0ed3d13fffd9"},
    {"baseline 2x1 with restarts", 35, 29,
     "3350cf461fcc4086f9f3c52b084b8c8209a77895fadd400c3d7c2523d8a3ff67",
     "ffd8ffe000104a46494600010100000100010000ffdb00831000500037003c0046003c00320050004600410046005a00550050005f0078"
     "00c800820078006e006e007800f500af00b9009100c8012200ff0131012c011d00ff011801130140016801cc01860140015401b3015901"
     "13011801900221019501b301db01ea020302080203013601810235025d023001f4025801cc01f9020301efffdb0083110055005a005a00"
     "780069007800eb0082008200eb01ef014a0118014a01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef"
     "01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01"
     "ef01ef01ef01ef01ef01efffc1001108001d002303012100021101031101ffc40018000003010100000000000000000000000000010203"
     "04ffc40025100002020005020700000000000000000001020003112131415112810413223242a1b1ffc400160101010100000000000000"
     "000000000000010200ffc4002111000202020201050000000000000000000001021112211331710322415161ffdd00040003ffda000c03"
     "010002110311003f00c52b9d095cd6660d62a64333332ccf04b276c750f23f2cf2612f289194becfffd0d2b499597173d35e4bcf30ab1e"
     "812bdcca2403828c4fd465bf6a252c99249ddcf6846a25e503ffd157392020cb98eaae3d02dab0b1c7b574fd880cb1390105a57f23274b"
     "143ea0344c4738c23c61c7fa7fffd29418b627797e218a22aafcb5333db1e89a944a3ea623607499bdf8082b61d84245592fd5767fffd9"},
    {"baseline 1x2", 35, 29,
     "4839dd6764af7344a2ae153001e4bc4bb370a2424b52b130fe1f6e4b443a59ba",
     "ffd8ffe000104a46494600010100000100010000ffdb00831000500037003c0046003c00320050004600410046005a00550050005f0078"
     "00c800820078006e006e007800f500af00b9009100c8012200ff0131012c011d00ff011801130140016801cc01860140015401b3015901"
     "13011801900221019501b301db01ea020302080203013601810235025d023001f4025801cc01f9020301efffdb0083110055005a005a00"
     "780069007800eb0082008200eb01ef014a0118014a01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef"
     "01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01ef01"
     "ef01ef01ef01ef01ef01efffc1001108001d002303011200021101031101ffc40018000101010101000000000000000000000002010003"
     "04ffc40025100002020005020700000000000000000001020003112131415112810413223242a1b1ffc400160101010100000000000000"
     "000000000000000102ffc4001d110002020301010100000000000000000000011121123141510222ffda000c03010002110311003f00e2"
     "95cf55692261852b82cb8b9e9af25e7996f8206d62a643330257b988f5894b488599e32403828c4fd428e22ac9e83e59e4cc49ddcf69ab"
     "247acd7392020cb991062d89de47f9a0be7ac55572f886288aabf2d4c97c04b1c7b574fd92a511095b19468c06589c8088fa988d81d225"
     "c4ba45c5fd6d93a80d1311ce32f61257865e0a8fffd9"},
    {"gray, progressive, later scans missing", 35, 29,
     "1764ec9ec5b08f036f783ba7c4cd625689f76e3db3cd2ed551a209a6b55ae971",
     "ffd8ffe000104a46494600010100000100010000ffdb004300100b0c0e0c0a100e0d0e1211101318281a181616183123251d283a333d3c"
     "3933383740485c4e404457453738506d51575f626768673e4d71797064785c656763ffc2000b08001d002301011100ffc4001900000203"
     "01000000000000000000000000010400020305ffda000801010000000147a7162e2537ca58d0e4ce573fffc4001d100003010002030100"
     "000000000000000000010302041112132122ffda00080101000105029ccc48d57381eb543d6c94caddedce437d1f4e46db232294425f3c"
     "9135deb93af5e25843fd68ffc4002110000006020105000000000000000000000001021011210312513132414281ffda0008010100063f"
     "026ab6eadae2ede79162125262f218d0beb6a917442912424c2529f668f04dffc4001e1000020202030101000000000000000000000111"
     "21314110516191f1ffda0008010100013f21f1e2ae8b77a195e3a7844db703555886db097a8fc4372c8f18993a2743c473ab71b32a8e48"
     "2bd89893b61d8fa65e5f8bf4893b659c1b090e9c423fffda00080101000000106b15ffffd9"},
    {"baseline cut short, with end marker", 35, 29,
     "aea14a75b17e013f58b2747db6f2857a8d5a7104f510429250a3f0ba2934bfb9",
     "ffd8ffe000104a46494600010100000100010000ffdb004300100b0c0e0c0a100e0d0e1211101318281a181616183123251d283a333d3c"
     "3933383740485c4e404457453738506d51575f626768673e4d71797064785c656763ffdb0043011112121815182f1a1a2f634238426363"
     "636363636363636363636363636363636363636363636363636363636363636363636363636363636363636363636363ffc0001108001d"
     "002303012200021101031101ffc400190000030101010000000000000000000000000305040106ffc4002d100001020404030705000000"
     "000000000001020300040511122131612251910614417181a1d1324262b1e1ffc400180100020300000000000000000000000000000102"
     "0304ffc4002b1100010204030607010000000000000000010002031112212231f00413416171d10532628191a1a2e1ffda000c03010002"
     "110311003f00874fa6dedc31e9e42942c091943e974e16048000cc9311aab5f727dd54ad2c944a8184b96cdce791d07f79c26b9c5b8734"
     "dcc13b992a537569492e0630b8bb7d40f0fb667c321d62639333550502a04a41be156494ebe03cf539c769d4926cb70151e6732636baf2"
     "1859625db0ebc922f71c09e6373f3e9016b21b8558de7ebb043223dcea3666cb9f1fe2c829ae285cbabbed703da08ead6e155dca838156"
     "17085103a0ffd9"},
    {"RGB with chroma 4x2", 35, 29,
     "1e05208ef0f2125abd8f5f220fd210a29678188a95e35c6f0f618132fe562356",
     "ffd8ffee000e41646f626500640000000000ffdb00831000500037003c0046003c00320050004600410046005a00550050005f007800c8"
     "00820078006e006e007800f500af00b9009100c8012200ff0131012c011d00ff011801130140016801cc01860140015401b30159011301"
     "1801900221019501b301db01ea020302080203013601810235025d023001f4025801cc01f9020301efffc1001108001d00230352420047"
     "1100421100ffc4001800010101010100000000000000000000000300020104ffc4002b1000020201010603090000000000000000010200"
     "1103210412223151814153f0134252619192a2b1c1ffda000c03520047004200003f0014c71d314d9098c5b90219da797b34eed1550016"
     "7402164da3ddc3f7425c658db124f531d30fca5543706800b633954a16b41a91d4c1272b1b391bb1a94a518e4c2a68b8ec2e5294e5a796"
     "d37c5d31faef05ddf3117a28e404de3c511d9308e2d5ab41d60bbbe634745e8226351359f21c2aa140b6bd4f84f3a2d9b3a933d58d04ed"
     "d8b3e3c47f93279f7f5fa8030e9ca5294ee4da597232aaad035aca529addcbf18fa099b5f2bf29ffd9"},
    {"CMYK", 19, 11,
     "c4ae217d64f07f3f1c565554d0ef4ffee8560f3b721260692cc7a080d16af15b",
     "ffd8ffee000e41646f626500640000000000ffdb004300281c1e231e19282321232d2b28303c64413c37373c7b585d4964918099968f80"
     "8c8aa0b4e6c3a0aadaad8a8cc8ffcbdaeef5ffffff9bc1fffffffaffe6fdfff8ffc0001408000b0013044311004d11005911004b1100ff"
     "c4001f0000010501010101010100000000000000000102030405060708090a0bffc400b5100002010303020403050504040000017d0102"
     "0300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25262728292a3435363738393a"
     "434445464748494a535455565758595a636465666768696a737475767778797a838485868788898a92939495969798999aa2a3a4a5a6a7"
     "a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9faffda000e04"
     "43004d0059004b00003f00a915bfb554820cf6aa76d0e715b35722b6f6ad082db38e2b4e38d228cc9210a8a3249a2ad0b5e3a538dcd921"
     "da66048f4048fcc542754507e4b62cbd896c1fcb145450a8f4a8edd471c525a01c71454978ed058c924476bae30719ee2935595e28e28d"
     "1b6ac818301dfa53354663711459f90206dbef93cd1584c4c877392cc7a92726a8aaaed1c522aaed1c515fffd9"},
};
#define FILES (sizeof files / sizeof files[0])

static void small_files_match_pillow(void)
{
    spm_context *ctx = spm_context_create(NULL);
    static uint8_t data[4096];
    size_t i;
    for (i = 0; i < FILES; i++) {
        spm_image image = SPM_ZERO;
        spm_error err;
        char hex[65];
        int width, height;
        size_t size = from_hex(files[i].file, data);
        CHECK_INT(spm_image_probe(data, size, &width, &height), SPM_IMAGE_JPEG);
        CHECK_INT(width, files[i].width);
        CHECK_INT(height, files[i].height);
        CHECK_INT(decode(ctx, data, size, 0, 0, &image, &err), SPM_OK);
        CHECK_STR(err.text, "");
        CHECK_INT(image.width, files[i].width);
        hash_image(&image, hex);
        CHECK_STR(hex, files[i].pixels);
        spm_image_free(ctx, &image);
    }
    spm_context_destroy(ctx);
}

/* Better quality comes closer; at 100 without halved chroma only rounding is left. */
static void round_trip_error_falls_with_quality(void)
{
    static const int qualities[4] = {10, 50, 90, 100};
    spm_context *ctx = spm_context_create(NULL);
    double before = 1e9;
    int i, x, y;
    for (i = 0; i < 4; i++) {
        spm_image image = SPM_ZERO, back = SPM_ZERO;
        spm_error err;
        uint8_t *data = NULL;
        size_t size = 0, k, n;
        double sum = 0;
        CHECK_INT(spm_image_create(ctx, 67, 45, &image, NULL), SPM_OK);
        for (y = 0; y < 45; y++)
            for (x = 0; x < 67; x++) {
                uint8_t *p = image.pixels + (y * 67 + x) * 3;
                p[0] = (uint8_t)(128 + 100 * sin(x * 0.2 + y * 0.1));
                p[1] = (uint8_t)(128 + 90 * sin(y * 0.25));
                p[2] = (uint8_t)(x * 3);
            }
        CHECK_INT(spm_image_encode_jpeg(ctx, &image, qualities[i], 0, &data, &size, NULL), SPM_OK);
        CHECK_INT(decode(ctx, data, size, 0, 0, &back, &err), SPM_OK);
        n = (size_t)67 * 45 * 3;
        for (k = 0; k < n && back.pixels; k++) sum += fabs((double)image.pixels[k] - back.pixels[k]);
        CHECK(sum / (double)n < before);
        before = sum / (double)n;
        spm_image_free(ctx, &image);
        spm_image_free(ctx, &back);
        spm_free(ctx, data);
    }
    CHECK(before < 1.0);
    spm_context_destroy(ctx);
}

static void encoder_refuses_bad_arguments(void)
{
    static const struct { int width, height, quality; const char *text; } cases[] = {
        {8, 8, 0, "quality 0"}, {8, 8, 101, "quality 101"}, {65501, 1, 75, "65501 x 1"}, {0, 8, 75, "0 x 8"}
    };
    spm_context *ctx = spm_context_create(NULL);
    static uint8_t pixels[65501 * 3];
    size_t i, size = 1;
    for (i = 0; i < 4; i++) {
        spm_image image;
        spm_error err = SPM_ZERO;
        uint8_t *data = pixels;
        image.pixels = pixels;
        image.width = cases[i].width;
        image.height = cases[i].height;
        CHECK_INT(spm_image_encode_jpeg(ctx, &image, cases[i].quality, 0, &data, &size, &err), SPM_E_ARGUMENT);
        CHECK(data == NULL && size == 0);
        CHECK_MSG(strstr(err.text, cases[i].text) != NULL, err.text);
    }
    spm_context_destroy(ctx);
}

/* ---- conformance ---- */

/* Files whose verdict differs from Pillow's on purpose. */
static const struct { const char *file, *reason; } exceptions[] = {
    {"testimgari.jpg", "arithmetic coding: unsupported, named so"}
};

static void conformance_files_match(void)
{
    const char *folder = getenv("SPURMEM_TEST_DATA");
    spm_context *ctx = spm_context_create(NULL);
    char path[700], *line, *end;
    uint8_t *list = NULL;
    size_t size;
    int good = 0, refused = 0;
    spm_error err = SPM_ZERO;
    (void)snprintf(path, sizeof path, "%s/codec/expected.tsv", folder ? folder : "");
    if (!folder || spm_file_read(ctx, path, &list, &size, &err) != SPM_OK) {
        spm_context_destroy(ctx);
        SKIP("SPURMEM_TEST_DATA/codec is not there");
    }
    for (line = strchr((char *)list, '\n'); line && line[1]; line = end) {
        char file[400], origin[64], verdict[32], format[32], mode[32], hash[80], hex[65];
        int width, height, bytes;
        spm_image image = SPM_ZERO;
        uint8_t *data = NULL;
        size_t i;
        spm_status status;
        line++;
        end = strchr(line, '\n');
        if (sscanf(line,
                   "%399[^\t]\t%63[^\t]\t%d\t%31[^\t]\t%31[^\t]\t%31[^\t]\t%d\t%d\t%79[^\t\r\n]", file, origin, &bytes,
                   verdict, format, mode, &width, &height, hash) != 9) break;
        if (!strstr(file, ".jpg") || strcmp(format, "PNG") == 0) continue;
        (void)snprintf(path, sizeof path, "%s/codec/%s", folder, file);
        if (spm_file_read(ctx, path, &data, &size, &err) != SPM_OK) {
            CHECK_MSG(0, path);
            continue;
        }
        status = decode(ctx, data, size, 0, 0, &image, &err);
        for (i = 0; i < sizeof exceptions / sizeof exceptions[0]; i++)
            if (strstr(file, exceptions[i].file)) break;
        if (i < sizeof exceptions / sizeof exceptions[0]) {
            printf("    exception: %s: %s\n", file, exceptions[i].reason);
            CHECK(status != SPM_OK && err.text[0]);
        } else if (strcmp(verdict, "ok") == 0) {
            CHECK_MSG(status == SPM_OK, err.text);
            if (status == SPM_OK) {
                hash_image(&image, hex);
                CHECK_MSG(image.width == width && image.height == height && strcmp(hex, hash) == 0, file);
                good++;
            }
        } else {
            CHECK_MSG(status != SPM_OK && err.text[0] && !image.pixels, file);
            refused++;
        }
        spm_image_free(ctx, &image);
        spm_free(ctx, data);
    }
    CHECK(good > 100 && refused > 100);
    spm_free(ctx, list);
    spm_context_destroy(ctx);
}

/* Files without their end marker: Pillow takes few of them, those whose last bits libjpeg-turbo has in its buffer
 * already.  Which of 120 it takes was found with Pillow 9.4; all of them read where truncated files are allowed. */
static void missing_end_marker_as_in_pillow(void)
{
    spm_context *ctx = spm_context_create(NULL);
    int i;
    for (i = 1; i <= 120; i++) {
        spm_image image = SPM_ZERO;
        spm_error err;
        uint8_t *data = NULL;
        size_t size = 0;
        draw(ctx, i, i * 7 % 40 + 1, &image);
        CHECK_INT(spm_image_encode_jpeg(ctx, &image, i * 7 % 100 + 1, i % 2, &data, &size, NULL), SPM_OK);
        spm_image_free(ctx, &image);
        CHECK_INT(decode(ctx, data, size - 2, 0, 0, &image, &err), i == 18 || i == 87 ? SPM_OK : SPM_E_FORMAT);
        spm_image_free(ctx, &image);
        CHECK_INT(decode(ctx, data, size - 2, 0, 1, &image, &err), SPM_OK);
        spm_image_free(ctx, &image);
        spm_free(ctx, data);
    }
    spm_context_destroy(ctx);
}

/* A segment on arithmetic coding: (table, value) pairs are judged, a Huffman file does not need them. */
static void conditioning_is_judged(void)
{
    static const struct { uint8_t segment[6]; spm_status status; } cases[] = {
        {{0xff, 0xcc, 0, 4, 0x00, 0x10}, SPM_OK}, {{0xff, 0xcc, 0, 4, 0x1f, 0x01}, SPM_OK},
        {{0xff, 0xcc, 0, 4, 0x20, 0x10}, SPM_E_FORMAT}, {{0xff, 0xcc, 0, 4, 0x00, 0x01}, SPM_E_FORMAT},
        {{0xff, 0xcc, 0, 3, 0x00, 0x10}, SPM_E_FORMAT}
    };
    spm_context *ctx = spm_context_create(NULL);
    size_t size, i;
    uint8_t *data = encoded(ctx, 60, &size), *file = (uint8_t *)malloc(size + 6);
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        spm_image image = SPM_ZERO;
        spm_error err;
        memcpy(file, data, 2);
        memcpy(file + 2, cases[i].segment, 6);
        memcpy(file + 8, data + 2, size - 2);
        CHECK_INT(decode(ctx, file, size + 6, 0, 0, &image, &err), cases[i].status);
        spm_image_free(ctx, &image);
    }
    free(file);
    spm_free(ctx, data);
    spm_context_destroy(ctx);
}

/* Every instruction set gives plain C's pixels: sound files, damaged ones (where sums wrap and saturate), and a wide
 * one at all scales. */
static void instruction_sets_agree(void)
{
    static const spm_isa sets[3] = {SPM_ISA_AVX512, SPM_ISA_AVX2, SPM_ISA_NEON};
    static uint8_t file[4096];
    spm_context_desc desc = SPM_ZERO;
    spm_context *plain;
    size_t i, at, k;
    int compared = 0;
    desc.threads = 1;
    desc.isa = SPM_ISA_C;
    plain = spm_context_create(&desc);
    for (k = 0; k < 3; k++) {
        spm_context *ctx;
        spm_image a = SPM_ZERO, b = SPM_ZERO;
        spm_error err;
        desc.isa = sets[k];
        ctx = spm_context_create(&desc);
        if (!ctx) continue;
        for (i = 0; i < FILES; i++) {
            const size_t size = from_hex(files[i].file, file);
            for (at = 20; at < size; at++) {
                const uint8_t saved = file[at];
                file[at] = (uint8_t)(at % 3 ? 0xff - saved : 0x7f);
                if (decode(plain, file, size, 0, 1, &a, &err) == SPM_OK) {
                    if ((size_t)a.width * (size_t)a.height < 100000) {
                        CHECK_INT(decode(ctx, file, size, 0, 1, &b, &err), SPM_OK);
                        CHECK(a.width == b.width && a.height == b.height
                              && memcmp(a.pixels, b.pixels, (size_t)a.width * (size_t)a.height * 3) == 0);
                        compared++;
                    }
                }
                spm_image_free(plain, &a);
                spm_image_free(ctx, &b);
                file[at] = saved;
            }
        }
        for (i = 0; i < 8; i++) {
            size_t size;
            uint8_t *data;
            draw(plain, 301 + (int)i, 37, &a);
            CHECK_INT(spm_image_encode_jpeg(plain, &a, 100, (int)i & 1, &data, &size, NULL), SPM_OK);
            spm_image_free(plain, &a);
            CHECK_INT(decode(plain, data, size, 1 << i / 2, 0, &a, &err), SPM_OK);
            CHECK_INT(decode(ctx, data, size, 1 << i / 2, 0, &b, &err), SPM_OK);
            CHECK(a.pixels && b.pixels && memcmp(a.pixels, b.pixels, (size_t)a.width * (size_t)a.height * 3) == 0);
            spm_image_free(plain, &a);
            spm_image_free(ctx, &b);
            spm_free(plain, data);
        }
        spm_context_destroy(ctx);
    }
    spm_context_destroy(plain);
    if (!compared) SKIP("only plain C here");
}

/* ---- damage ---- */

static void every_prefix_is_an_error(void)
{
    spm_context *ctx = spm_context_create(NULL);
    static uint8_t file[4096];
    size_t i, size, n;
    for (i = 0; i < FILES; i++) {
        size = from_hex(files[i].file, file);
        for (n = 0; n < size - 1; n++) {
            spm_image image = SPM_ZERO;
            spm_error err;
            uint8_t *copy = (uint8_t *)malloc(n ? n : 1); /* of the exact size: reads behind it show under ASan */
            memcpy(copy, file, n);
            if (decode(ctx, copy, n, 0, 0, &image, &err) == SPM_OK) {
                /* only the end marker may be missing, and only in files of one scan */
                CHECK_MSG(n >= size - 2, files[i].name);
            } else {
                CHECK(err.status == SPM_E_FORMAT && err.text[0] && !image.pixels);
            }
            spm_image_free(ctx, &image);
            if (decode(ctx, copy, n, 0, 1, &image, &err) == SPM_OK) {
                CHECK_INT(image.width, files[i].width);
                CHECK_INT(image.height, files[i].height);
            }
            spm_image_free(ctx, &image);
            free(copy);
        }
    }
    spm_context_destroy(ctx);
}

/* Half of a file: the upper rows are the picture's, the rest is gray. */
static void truncated_files_give_what_is_there(void)
{
    spm_context *ctx = spm_context_create(NULL);
    spm_image image = SPM_ZERO, whole = SPM_ZERO;
    spm_error err;
    size_t size;
    uint8_t *data = encoded(ctx, 90, &size);
    CHECK_INT(decode(ctx, data, size, 0, 0, &whole, &err), SPM_OK);
    CHECK_INT(decode(ctx, data, size - 350, 0, 0, &image, &err), SPM_E_FORMAT);
    CHECK_MSG(strstr(err.text, "truncated") != NULL, err.text);
    CHECK_INT(decode(ctx, data, size - 350, 0, 1, &image, &err), SPM_OK);
    if (image.pixels && whole.pixels) {
        CHECK(memcmp(image.pixels, whole.pixels, 8 * 40 * 3) == 0);
        CHECK(memcmp(image.pixels, whole.pixels, 24 * 40 * 3) != 0);
    }
    spm_image_free(ctx, &image);
    spm_image_free(ctx, &whole);
    spm_free(ctx, data);
    spm_context_destroy(ctx);
}

/* Single bytes changed everywhere, in all kinds of files: any verdict, no crash, sentences with errors. */
static void changed_bytes_do_no_harm(void)
{
    static const uint8_t values[3] = {0x00, 0xff, 0x5a};
    spm_context *ctx = spm_context_create(NULL);
    static uint8_t file[4096];
    size_t i, at, size;
    int k;
    for (i = 0; i < FILES; i++) {
        size = from_hex(files[i].file, file);
        for (at = 0; at < size; at++) {
            uint8_t saved = file[at];
            for (k = 0; k < 3; k++) {
                spm_decode_desc desc = SPM_ZERO;
                spm_image image = SPM_ZERO;
                spm_error err = SPM_ZERO;
                spm_status status;
                file[at] = values[k];
                desc.max_bytes = 1 << 20;
                status = spm_image_decode(ctx, "test.jpg", file, size, &desc, &image, &err);
                CHECK((status == SPM_OK) == (image.pixels != NULL) && (status == SPM_OK) == (err.text[0] == 0));
                spm_image_free(ctx, &image);
            }
            file[at] = saved;
        }
    }
    spm_context_destroy(ctx);
}

/* Headers that lie.  `at` counts from the frame marker (FF C0) of a small baseline file. */
static void hostile_headers_are_refused(void)
{
    static const struct { int at, value; spm_status status; const char *text; } cases[] = {
        {1, 0xc3, SPM_E_UNSUPPORTED, "lossless"}, {1, 0xc9, SPM_E_UNSUPPORTED, "arithmetic"},
        {1, 0xca, SPM_E_UNSUPPORTED, "arithmetic"},
        {1, 0xcf, SPM_E_UNSUPPORTED, "hierarchical"}, {3, 0x12, SPM_E_FORMAT, "length"},
        {4, 12, SPM_E_UNSUPPORTED, "12 bits"},
        {9, 2, SPM_E_FORMAT, "length"}, {11, 0x02, SPM_E_FORMAT, "0x2"}, {11, 0x25, SPM_E_FORMAT, "2x5"},
        {11, 0x44, SPM_E_FORMAT, "18 blocks"}, {11, 0x32, SPM_E_UNSUPPORTED, "1x1 beside 3x2"},
        {12, 3, SPM_E_FORMAT, "table 3"},
        {10, 9, SPM_E_FORMAT, "component 1"}
    };
    failing m = SPM_ZERO;
    spm_context *ctx = failing_context(&m, 1);
    spm_image image = SPM_ZERO;
    spm_error err;
    size_t size, i, frame;
    uint8_t *data = encoded(ctx, 50, &size);
    for (frame = 0; data[frame] != 0xff || data[frame + 1] != 0xc0; frame++) {}
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint8_t *at = data + frame + cases[i].at, saved = *at;
        *at = (uint8_t)cases[i].value;
        /* 3x2 alone asks for the ratio 3:2 of the second component, which the frame then lacks */
        if (cases[i].value == 0x32) data[frame + 14] = 0x21;
        CHECK_INT(decode(ctx, data, size, 0, 0, &image, &err), cases[i].status);
        CHECK_MSG(cases[i].value == 0x32 || strstr(err.text, cases[i].text) != NULL, err.text);
        CHECK(!image.pixels);
        *at = saved;
        data[frame + 14] = 0x11;
    }
    /* 65500 x 65500 in a kilobyte: refused before anything large is allocated; so is a cap that is too low */
    data[frame + 5] = data[frame + 7] = 0xff;
    data[frame + 6] = data[frame + 8] = 0xdc;
    m.largest = 0;
    CHECK(decode(ctx, data, size, 0, 0, &image, &err) != SPM_OK);
    CHECK_MSG(strstr(err.text, "65500 x 65500") != NULL, err.text);
    CHECK(m.largest < 1 << 20);
    data[frame + 6] = 0xdd;
    CHECK_INT(decode(ctx, data, size, 0, 0, &image, &err), SPM_E_FORMAT);
    data[frame + 5] = data[frame + 6] = 0;
    CHECK_INT(decode(ctx, data, size, 0, 0, &image, &err), SPM_E_FORMAT);
    spm_free(ctx, data);
    spm_context_destroy(ctx);
    CHECK_INT(m.live, 0);
}

/* A progressive file of 2048 x 2048 whose scans take 18 bytes each and visit every block: stopped by the work limit. */
static void repeated_scans_are_stopped(void)
{
    static const uint8_t head[] = {
        0xff, 0xd8, 0xff, 0xc2, 0, 11, 8, 8, 0, 8, 0, 1, 1, 0x11, 0, 0xff, 0xc4, 0, 20, 0x10,
        1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xe0, 0xff, 0xdb, 0, 67, 0
    };
    static const uint8_t scan[18] = {0xff, 0xda, 0, 8, 1, 1, 0, 1, 63, 0};
    spm_context *ctx = spm_context_create(NULL);
    spm_image image = SPM_ZERO;
    spm_error err;
    size_t size = sizeof head + 64 + 1000 * sizeof scan + 2, i;
    uint8_t *data = (uint8_t *)malloc(size);
    memcpy(data, head, sizeof head);
    memset(data + sizeof head, 1, 64);
    for (i = 0; i < 1000; i++) memcpy(data + sizeof head + 64 + i * sizeof scan, scan, sizeof scan);
    data[size - 2] = 0xff;
    data[size - 1] = 0xd9;
    CHECK_INT(decode(ctx, data, size, 0, 0, &image, &err), SPM_E_FORMAT);
    CHECK_MSG(strstr(err.text, "more scans") != NULL, err.text);
    free(data);
    spm_context_destroy(ctx);
}

/* ---- orientation, memory ---- */

/* Each of the eight EXIF orientations against its definition: where the upright picture's pixel (x, y) comes from. */
static void exif_orientation_turns(void)
{
    spm_context *ctx = spm_context_create(NULL);
    spm_image plain = SPM_ZERO;
    spm_error err;
    size_t size;
    uint8_t *data = encoded(ctx, 90, &size), *file = (uint8_t *)malloc(size + 36);
    int o, big, x, y;
    CHECK_INT(decode(ctx, data, size, 0, 0, &plain, &err), SPM_OK);
    for (big = 0; big < 2; big++) {
        for (o = 1; o <= 8; o++) {
            uint8_t app[36] = {0xff, 0xe1, 0, 34, 'E', 'x', 'i', 'f', 0, 0, 'M', 'M', 0, 42, 0, 0, 0, 8, 0, 1, 1, 0x12,
                               0, 3, 0, 0, 0, 1};
            static const uint8_t little[18] = {'I', 'I', 42, 0, 8, 0, 0, 0, 1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0};
            spm_decode_desc desc = SPM_ZERO;
            spm_image turned = SPM_ZERO;
            int wrong = 0;
            if (!big) memcpy(app + 10, little, 18);
            app[big ? 29 : 28] = (uint8_t)o;
            memcpy(file, data, 2);
            memcpy(file + 2, app, 36);
            memcpy(file + 38, data + 2, size - 2);
            desc.apply_exif = 1;
            CHECK_INT(spm_image_decode(ctx, "test.jpg", file, size + 36, &desc, &turned, NULL), SPM_OK);
            CHECK_INT(turned.width, o >= 5 ? 24 : 40);
            CHECK_INT(turned.height, o >= 5 ? 40 : 24);
            for (y = 0; y < turned.height; y++) {
                for (x = 0; x < turned.width; x++) {
                    int sx = o == 1 || o == 4 ? x : o == 2 || o == 3 ? 39 - x : o == 5 || o == 6 ? y : 39 - y;
                    int sy = o == 1 || o == 2 ? y : o == 3 || o == 4 ? 23 - y : o == 5 || o == 8 ? x : 23 - x;
                    wrong += memcmp(turned.pixels + (y * turned.width + x) * 3, plain.pixels + (sy * 40 + sx) * 3, 3)
                             != 0;
                }
            }
            CHECK_INT(wrong, 0);
            spm_image_free(ctx, &turned);
            CHECK_INT(decode(ctx, file, size + 36, 0, 0, &turned, &err), SPM_OK);
            CHECK_INT(turned.width, 40);
            spm_image_free(ctx, &turned);
        }
    }
    spm_image_free(ctx, &plain);
    free(file);
    spm_free(ctx, data);
    spm_context_destroy(ctx);
}

static void failing_memory_leaks_nothing(void)
{
    static uint8_t file[4096];
    failing m = SPM_ZERO;
    spm_context *ctx = failing_context(&m, 1);
    long live = m.live, n;
    size_t i, size;
    spm_image image = SPM_ZERO;
    spm_error err;
    for (i = 0; i < FILES; i++) {
        size = from_hex(files[i].file, file);
        for (n = 1;; n++) {
            spm_status status;
            m.calls = 0;
            m.fail_at = n;
            status = decode(ctx, file, size, 0, 0, &image, &err);
            m.fail_at = 0;
            if (status == SPM_OK) break;
            CHECK_INT(status, SPM_E_MEMORY);
            CHECK(!image.pixels && err.text[0]);
            CHECK_INT(m.live, live);
        }
        CHECK(n > 4);
        spm_image_free(ctx, &image);
        CHECK_INT(m.live, live);
    }
    draw(ctx, 200, 100, &image);
    live = m.live;
    for (n = 1;; n++) {
        uint8_t *data = NULL;
        spm_status status;
        m.calls = 0;
        m.fail_at = n;
        memset(&err, 0, sizeof err);
        status = spm_image_encode_jpeg(ctx, &image, 95, 1, &data, &size, &err);
        m.fail_at = 0;
        spm_free(ctx, data);
        CHECK_INT(m.live, live);
        if (status == SPM_OK) break;
        CHECK_INT(status, SPM_E_MEMORY);
    }
    CHECK(n > 4);
    spm_image_free(ctx, &image);
    spm_context_destroy(ctx);
    CHECK_INT(m.live, 0);
}

int main(void)
{
    TEST(encoder_matches_pillow);
    TEST(scaled_decoding_matches_pillow);
    TEST(small_files_match_pillow);
    TEST(round_trip_error_falls_with_quality);
    TEST(encoder_refuses_bad_arguments);
    TEST(conformance_files_match);
    TEST(missing_end_marker_as_in_pillow);
    TEST(conditioning_is_judged);
    TEST(instruction_sets_agree);
    TEST(every_prefix_is_an_error);
    TEST(truncated_files_give_what_is_there);
    TEST(changed_bytes_do_no_harm);
    TEST(hostile_headers_are_refused);
    TEST(repeated_scans_are_stopped);
    TEST(exif_orientation_turns);
    TEST(failing_memory_leaks_nothing);
    return TEST_END;
}
